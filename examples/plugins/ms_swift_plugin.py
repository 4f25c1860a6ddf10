r"""Adds `--optimizer loraplus` to ms-swift; give this file to `--external_plugins`.

swift sft --model Qwen/Qwen2.5-0.5B --dataset AI-ModelScope/alpaca-gpt4-data-en --tuner_type lora \
    --external_plugins examples/plugins/ms_swift_plugin.py --optimizer loraplus --optim_args ratio=16 \
    --learning_rate 1e-4
"""

import loraplus.integrations.ms_swift  # noqa: F401
