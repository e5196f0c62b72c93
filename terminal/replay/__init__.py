"""Conversations with cards as files: run again, byte for byte, or made from a card on the reader.

A replay file holds everything that a transaction depends on: the terminal's settings, the transaction, what chance and
the cardholder said, the host's answer, and what the card answered. The kernels do not know that no card is there. Two
smaller files ask for one part only: offline data authentication, or one step of the terminal's risk management.

    formats     what stands in the files, checked whole before anything runs; the published JSON Schemas
    settings    from a file to what a kernel is run with
    script      a card that answers from a list
    run         a replay file, run: what came of it
    steps       an authentication or a risk file, run
    masking     card data that must not be shown, or not be written
    recording   a replay file, made from a card
"""
