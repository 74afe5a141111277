"""Clients of the cluster: asynchronous (`kvtcp.connect`) and synchronous (`kvtcp.sync.connect`).

Bottom up: `url` and `codecs`; `core`, the pure state of one connection; `requests`, from arguments to messages;
`administration`, the same for changes of the cluster; `channel`, the socket and the rules for trying again; `aio`, the
asynchronous client; `loop_thread` and `sync`, the synchronous client over it. Nothing is imported here: `kvtcp` imports
the module that is asked for.
"""
