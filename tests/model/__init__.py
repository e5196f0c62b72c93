"""An executable model of terminal, sync, network, host, Stripe and customer (docs/model.md)."""
