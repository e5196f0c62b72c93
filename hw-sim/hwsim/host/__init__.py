"""The operator's host, simulated but real on the wire.

It unseals card data, lets the issuer decide, keeps books in its own SQLite file and signs its answers, all behind HTTPS
with a test authority of its own. It follows docs/formats.md and docs/host-api.yaml and shares no code with the
terminal: where the two disagree, one of them has not done what the documents say.
"""

from hwsim.host.host import Host, Known, Problem, Refused, Reply, provision
from hwsim.host.store import Booking, Fork, State

__all__ = ["Booking", "Fork", "Host", "Known", "Problem", "Refused", "Reply", "State", "provision"]
