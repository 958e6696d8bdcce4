"""What autoscaling does with a step of load."""
