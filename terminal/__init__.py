"""The payment terminal: EMV kernel, ledger, sync, screens, and the flow that ties them together."""

VERSION = "0.1.0"
