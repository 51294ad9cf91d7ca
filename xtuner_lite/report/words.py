"""The words of the report page in the languages it speaks."""

LANGUAGES = ("en", "zh")

WORDS = {
    "en": {
        "state": "state", "running": "running", "finished": "finished", "failed": "failed",
        "stopped": "stopped before its end", "steps": "optimizer steps", "loss": "last loss",
        "best": "best validation loss", "tokens": "tokens trained", "speed": "tokens per second",
        "time": "time in steps", "memory": "peak memory", "curves": "Curves",
        "samples": "Chat samples over time", "step": "step", "ledger": "Data ledger",
        "preview": "First training sample", "config": "Config", "environment": "Environment",
        "checkpoints": "Checkpoints", "failure": "What it failed by", "notes": "Not readable",
        "nothing": "nothing yet", "made": "made", "attempts": "attempts",
        "no_samples": "No chat samples: add an EvaluateChatHook to the config.",
        "newest": "newest", "earlier": "earlier answers",
    },
    "zh": {
        "state": "状态", "running": "训练中", "finished": "已完成", "failed": "失败",
        "stopped": "提前停止", "steps": "优化步数", "loss": "最新损失",
        "best": "最佳验证损失", "tokens": "已训练 token", "speed": "每秒 token",
        "time": "步内总时间", "memory": "内存峰值", "curves": "曲线",
        "samples": "对话样例的变化", "step": "第几步", "ledger": "数据账本",
        "preview": "第一条训练样本", "config": "配置", "environment": "环境",
        "checkpoints": "检查点", "failure": "失败原因", "notes": "无法读取",
        "nothing": "暂无", "made": "生成于", "attempts": "启动次数",
        "no_samples": "没有对话样例：在配置中加入 EvaluateChatHook。",
        "newest": "最新", "earlier": "此前的回答",
    },
}  # fmt: skip
