"""The artifact: a folder of safetensors and JSON that says how to quantize one model's KV cache.

`docs/artifact.md` is the format's specification.
"""
