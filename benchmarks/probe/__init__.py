"""How small a disturbance of weights shows in the answers to the probe prompt."""
