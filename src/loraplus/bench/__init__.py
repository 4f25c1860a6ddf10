"""Speed and memory, side by side: what `loraplus bench` and benchmarks/gpu_speed.py measure with."""
