"""The EMV kernel, sans-I/O.

Every step is a generator that yields command APDUs and is sent response APDUs; steps compose with `yield from`. Nothing
here opens a device, reads a clock or draws a random number: whoever pumps the generator brings those.
References such as "Book 3, 10.5" are to EMV 4.4; "Book A", "Book B", "C-3" to the EMV Contactless Books.
"""
