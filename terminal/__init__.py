"""The payment terminal: EMV kernel, ledger, sync, screens, and the flow that ties them together."""

VERSION = "0.1.0"
RELEASED_MS = 1_795_392_000_000  # 2026-11-23: no clock that says an earlier day can be right
