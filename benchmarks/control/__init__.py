"""What the control path costs as layers, prompts, ranks and peers grow."""
