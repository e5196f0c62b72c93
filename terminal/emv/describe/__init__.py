"""EMV data put into words, for people who look at what cards and terminals say.

Names, bits and meanings are many, and a running terminal needs none of them: nothing that it imports imports this
package. With the kernels it shares how data objects are read (`tlv`, `dol`) and what formats they have (`tags`).
"""
