"""The words of the page in English and Chinese, and which of them a visitor gets."""

from __future__ import annotations

LANGUAGES = ("en", "zh")

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "ask": "Ask something",
        "ask_pictures": "Ask something; pictures can be added or dropped here",
        "send": "Send",
        "stop": "Stop",
        "retry": "Answer again",
        "clear": "Clear",
        "compare": "Compare with the base model",
        "compare_info": "One question, two answers: with the adapter, and with it switched off.",
        "adapted": "Fine-tuned",
        "base": "Base model",
        "settings": "Settings",
        "system": "System prompt",
        "system_info": "Empty: what the model's own template says.",
        "temperature": "Temperature",
        "temperature_info": "0 takes the likeliest token each time; higher varies more.",
        "top_p": "Top-p",
        "top_p_info": "Choose among the likeliest tokens that hold this share; 1 is all.",
        "top_k": "Top-k",
        "top_k_info": "Choose among this many tokens; 0 is all.",
        "repetition_penalty": "Repetition penalty",
        "repetition_penalty_info": "Above 1, tokens already seen become less likely.",
        "max_new_tokens": "Longest answer (tokens)",
        "seed": "Seed",
        "seed_info": "Empty: another answer each time.",
        "waiting": "Waiting: {count} before you.",
        "busy": "The answer is still being written; wait for it, or press Stop.",
        "nothing_to_retry": "There is no question to answer again.",
        "too_long": "The message has {length} characters; at most {limit} are taken: shorten it.",
        "bad_picture": "The picture cannot be used: {error}",
        "failed": "No answer: {error}",
        "broken": "No answer: {error} in the server; its console says more.",
        "bad_settings": "The settings cannot be used: {error}",
        "cut": "(The answer reached its longest length; raise it in the settings.)",
        "password": "Any name will do; the password is the one set by whoever runs this page.",
    },
    "zh": {
        "ask": "请输入问题",
        "ask_pictures": "请输入问题，可添加或拖入图片",
        "send": "发送",
        "stop": "停止",
        "retry": "重新回答",
        "clear": "清空",
        "compare": "与基座模型对比",
        "compare_info": "同一个问题，两个回答：一个使用适配器，一个关闭适配器。",
        "adapted": "微调后",
        "base": "基座模型",
        "settings": "设置",
        "system": "系统提示词",
        "system_info": "留空则使用模型自带模板的内容。",
        "temperature": "温度 (temperature)",
        "temperature_info": "0 表示每次取概率最大的词元；越大变化越多。",
        "top_p": "Top-p",
        "top_p_info": "在累计概率达到该值的词元中采样；1 表示不限制。",
        "top_k": "Top-k",
        "top_k_info": "在概率最大的 K 个词元中采样；0 表示不限制。",
        "repetition_penalty": "重复惩罚",
        "repetition_penalty_info": "大于 1 时，已出现的词元概率降低。",
        "max_new_tokens": "回答的最大长度（词元）",
        "seed": "随机种子",
        "seed_info": "留空则每次的回答不同。",
        "waiting": "排队中：前面还有 {count} 个回答。",
        "busy": "回答尚未结束，请等待，或按“停止”。",
        "nothing_to_retry": "还没有可以重新回答的问题。",
        "too_long": "消息有 {length} 个字符，最多允许 {limit} 个，请缩短。",
        "bad_picture": "图片无法使用：{error}",
        "failed": "没有得到回答：{error}",
        "broken": "没有得到回答：服务器出错（{error}），详情见其控制台。",
        "bad_settings": "设置无效：{error}",
        "cut": "（回答已达到最大长度，可在设置中调大。）",
        "password": "用户名任意，密码由运行此页面的人设定。",
    },
}


def language_of(header: str | None) -> str:
    """'zh' or 'en': the first language of an Accept-Language header that the page speaks.

    Args:
        header: such as 'zh-CN,zh;q=0.9,en;q=0.8'; None or unknown languages give 'en'.
    """
    weighted = []
    for item in (header or "").split(","):
        tag, _, weight = item.strip().partition(";q=")
        try:
            weighted.append((-float(weight or 1), tag.partition("-")[0].lower()))
        except ValueError:
            continue  # a malformed weight: that entry says nothing
    spoken = [tag for _, tag in sorted(weighted, key=lambda pair: pair[0]) if tag in LANGUAGES]
    return spoken[0] if spoken else "en"
