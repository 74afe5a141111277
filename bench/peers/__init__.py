"""The peers that figures are compared with."""
