"""Fakes of what the package meets outside: a clock, a network, a transport, and whole engines.

Nothing here starts a thread or opens a socket. Time passes when a test says so, a message arrives
when a test delivers it, and a read moves its bytes when a test lets it.
"""
