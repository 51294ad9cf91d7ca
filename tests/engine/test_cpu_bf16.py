"""bf16 products in float32: the numbers, what is kept, where it applies and where it does not."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tests.tiny import tiny_batch, tiny_llama, tiny_segments
from xtuner_lite.engine import cpu_bf16, precision
from xtuner_lite.engine.precision import Precision
from xtuner_lite.methods.sft import SupervisedFinetune

BF16 = torch.bfloat16


@pytest.fixture
def switch():
    """Turns the products on and off; afterwards they are as they were."""
    before = cpu_bf16.is_enabled()

    def turn(on):
        (cpu_bf16.enable if on else cpu_bf16.disable)()

    turn(True)
    yield turn
    turn(before)


def drawn(*shape, seed=0, dtype=BF16):
    """A leaf of normal numbers that fit bf16, so that no rounding of operands is in the way."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator).to(BF16)
    return numbers.to(dtype).requires_grad_()


def attend(**options):
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, **options)


#: name -> (function, shapes of its operands)
PRODUCTS = {
    "linear": (linear, [(2, 5, 8), (3, 8)]),
    "linear of one row": (linear, [(8,), (3, 8)]),
    "linear with bias": (linear, [(2, 5, 8), (3, 8), (3,)]),
    "matmul": (torch.matmul, [(2, 3, 5, 8), (2, 3, 8, 4)]),
    "matmul, broadcast": (torch.matmul, [(2, 1, 5, 8), (3, 8, 4)]),
    "matmul with a matrix": (torch.matmul, [(2, 5, 8), (8, 4)]),
    "@": (lambda a, b: a @ b.mT, [(5, 8), (4, 8)]),
    "mm": (torch.mm, [(5, 8), (8, 4)]),
    "bmm": (torch.bmm, [(2, 5, 8), (2, 8, 4)]),
    "addmm": (torch.addmm, [(4,), (5, 8), (8, 4)]),
    "attention": (attend(is_causal=True), [(1, 2, 6, 8)] * 3),
    "attention, scaled": (attend(scale=0.3), [(1, 2, 6, 8)] * 3),
    "attention, grouped heads": (
        attend(is_causal=True, enable_gqa=True),
        [(1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)],
    ),
    "attention, mask": (
        attend(attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(1)),
        [(1, 2, 6, 8)] * 3,
    ),
    "attention, mask of numbers": (
        attend(attn_mask=torch.arange(36.0).reshape(6, 6) / 8),
        [(1, 2, 6, 8)] * 3,
    ),
}


def run(function, operands):
    """Output and gradients, for an output gradient that fits bf16."""
    out = function(*operands)
    grad = drawn(*out.shape, seed=9).detach().to(out.dtype)
    return out.detach(), torch.autograd.grad(out, operands, grad)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_float32_product_rounded_once(switch, name, dtype):
    function, shapes = PRODUCTS[name]
    operands = [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    exact, exact_gradients = run(
        function, [drawn(*s, seed=i).float() for i, s in enumerate(shapes)]
    )
    with torch.autocast("cpu", BF16):
        out, gradients = run(function, operands)
    torch.testing.assert_close(out, exact.to(BF16), rtol=0, atol=0)
    for gradient, theirs in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, theirs.to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_further_from_float32_than_torchs_own(switch, name):
    function, shapes = PRODUCTS[name]
    operands = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    exact, exact_gradients = run(function, [x.detach().float().requires_grad_() for x in operands])

    def error():
        with torch.autocast("cpu", BF16):
            out, gradients = run(function, operands)
        pairs = zip([out, *gradients], [exact, *exact_gradients], strict=True)
        return torch.stack([(ours - theirs).norm() / theirs.norm() for ours, theirs in pairs])

    ours = error()
    switch(False)
    theirs = error()
    assert (theirs < 0.02).all()  # both compute the same thing
    assert (ours <= 1.01 * theirs + 1e-6).all(), (ours, theirs)


def test_dropout_of_attention_weights_has_gradients(switch):
    query = drawn(1, 2, 6, 8)
    with torch.autocast("cpu", BF16):
        out = scaled_dot_product_attention(query, query, query, dropout_p=0.5, is_causal=True)
    out.float().sum().backward()
    assert out.dtype == BF16
    assert query.grad.isfinite().all()
    assert query.grad.any()


def test_what_does_not_fit_goes_torchs_way(switch):
    vector, matrix = drawn(8), drawn(8, 4)
    double = torch.ones(5, 8, dtype=torch.float64)
    with torch.autocast("cpu", BF16):
        assert (vector @ matrix).dtype == BF16
        assert torch.addmm(drawn(4), drawn(5, 8), matrix, beta=0.5).dtype == BF16
        assert (double @ double.T).dtype == torch.float64  # autocast leaves double alone
    with torch.autocast("cpu", torch.float16):
        half = linear(vector.float(), matrix.float().T)
    torch.testing.assert_close(half, linear(vector.half(), matrix.half().T), rtol=0, atol=0)


def test_nothing_changes_outside_autocast(switch):
    layer, x = nn.Linear(64, 64), drawn(32, 64, dtype=torch.float32)
    inputs = [(layer, x), (nn.Linear(64, 64).to(BF16), x.to(BF16))]
    ours = [run(lambda x, layer=layer: layer(x), [x]) for layer, x in inputs]
    switch(False)
    theirs = [run(lambda x, layer=layer: layer(x), [x]) for layer, x in inputs]
    for (out, (grad,)), (their_out, (their_grad,)) in zip(ours, theirs, strict=True):
        assert torch.equal(out, their_out)
        assert torch.equal(grad, their_grad)


def loss_and_gradients(autocast=True, dtype=BF16, **options):
    """One SFT step of a tiny LoRA model; the loss per token, and name -> gradient."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, init_lora_weights=False)
    sft = SupervisedFinetune(tiny_llama().to(dtype), lora=lora, self_check=False, **options)
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = sft(tiny_batch([tiny_segments(7, 5, 9)]))
    (out.loss_sum / out.num_units).backward()
    gradients = {name: p.grad for name, p in sft.trainable_parameters().items()}
    return float(out.loss_sum.detach() / out.num_units), gradients


def difference(ours, theirs):
    """|ours - theirs| / |theirs|, Euclidean over all gradients."""
    flat, their_flat = (torch.cat([g.flatten() for g in x.values()]) for x in (ours, theirs))
    return float((flat - their_flat).norm() / their_flat.norm())


def test_a_lora_step_is_as_close_to_float32_as_torchs_own(switch):
    loss, gradients = loss_and_gradients()
    exact_loss, exact = loss_and_gradients(autocast=False, dtype=torch.float32)
    switch(False)
    their_loss, theirs = loss_and_gradients()
    assert loss == pytest.approx(exact_loss, rel=0.01)
    assert loss == pytest.approx(their_loss, rel=0.01)
    assert all(g.dtype == torch.float32 and g.any() for g in gradients.values())
    assert 0 < difference(gradients, exact) < 0.1
    assert difference(gradients, exact) < 1.2 * difference(theirs, exact)


def test_activation_checkpointing_changes_nothing(switch):
    """The layer is computed again in the backward pass, outside the context of the forward."""
    loss, gradients = loss_and_gradients()
    again_loss, again = loss_and_gradients(activation_checkpointing=True)
    assert loss == again_loss
    assert difference(again, gradients) == 0


def test_a_checkpointed_product_is_computed_again_in_float32(switch):
    x, layer = drawn(4, 8), nn.Linear(8, 8)
    with torch.autocast("cpu", BF16):
        out = checkpoint(layer, x, use_reentrant=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.float().sum().backward()
    assert {"_Product", "_ProductBackward"} <= {event.name for event in profile.events()}


def test_no_more_is_kept_for_the_backward_pass(switch):
    def kept():
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = tiny_batch([tiny_segments(40, 40)])
        model = SupervisedFinetune(tiny_llama().to(BF16), lora=LoraConfig(r=4), self_check=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", BF16):
                out = model(batch)
        assert out.loss_sum.requires_grad
        return sum(storages.values())

    ours = kept()
    switch(False)
    assert ours <= kept()


def test_precision_turns_them_on_where_bf16_is_emulated(switch, monkeypatch):
    switch(False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("fp32", "fp16", "auto"):
        with Precision(name).autocast():
            assert not cpu_bf16.is_enabled()
    emulated = Precision("bf16")
    assert emulated.reason == (
        "set by the config; bf16 products are computed in float32, this CPU only emulates bf16"
    )
    assert not cpu_bf16.is_enabled()
    with emulated.autocast():
        assert cpu_bf16.is_enabled()


@pytest.mark.parametrize(
    ("device", "machine", "native"),
    [("cpu", "x86_64", True), ("cpu", "aarch64", False), ("cuda", "x86_64", False)],
)
def test_precision_leaves_all_others_alone(switch, monkeypatch, device, machine, native):
    switch(False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert not precision.emulates_bf16(device)
    untouched = Precision("bf16", device)
    assert untouched.reason == "set by the config"
    if device == "cpu":
        with untouched.autocast():
            assert linear(drawn(2, 8), drawn(3, 8)).dtype == BF16
    assert not cpu_bf16.is_enabled()
