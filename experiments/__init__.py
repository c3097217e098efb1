"""The experiments of the study and beyond, on top of qwen_min, lora and flops.

The study: a student's unpublished coursework report of April 2025 on LoRA fine-tuning of Qwen2.5-0.5B-Instruct, within
1e17 FLOPs, to forecast predator-prey series. Its sections are cited by number.
"""
