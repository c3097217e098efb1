"""The experiments of the report, on top of qwen_min, lora and flops."""
