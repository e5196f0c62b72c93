"""Simulated hardware, cards and hosts. They sit below the real libraries (nfcpy, luma, TLS), never instead of them."""
