"""What carries messages and bytes: the control channel (ZeroMQ), the data plane (NIXL)."""
