"""The control plane: QMP clients and their commands."""

from blockd.qmp.access import AccessList, Holders
from blockd.qmp.server import QmpServer
from blockd.qmp.services import Services

__all__ = ["AccessList", "Holders", "QmpServer", "Services"]
