"""What Ray Serve's ingress adds."""
