"""What happens around the loop: MMEngine's Hook contract, one small module for each hook of ours.

Importing this package loads no torch; each module loads what its hook needs.
"""

from xtuner_lite.engine.hooks.defaults import DEFAULT_HOOKS

__all__ = ["DEFAULT_HOOKS"]
