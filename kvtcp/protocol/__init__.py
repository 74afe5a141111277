"""The wire protocol: framing and codec, the message table of clients, the operations of the node links. Pure."""
