"""One declaration per command: the arguments' names, types, defaults and meaning.

They validate what clients send (``blockd.qmp.arguments``), and the command table comes from them.
"""
