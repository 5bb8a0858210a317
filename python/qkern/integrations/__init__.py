"""Where other packages meet qkern: the only importers of transformers, peft and bitsandbytes."""
