"""What the terminal remembers: the journal (what happened, chained) and the ledger (the queryable state).

`Ledger` is the way in; `Envelopes` and `verify_answer` are the way to the host and back; `resolve` ends, at the start,
what a power cut had cut off.
"""
