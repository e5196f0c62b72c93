"""What the books call each data object, and the templates that it comes in (EMV 4.4 Book 3, Annex A; Books C-2 and C-3,
Annex A). Format, length and source stand in `terminal.emv.tags`.

Written `tag name | templates`, because a table is read best as a table.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Name(NamedTuple):
    """A data object's name and the tags of its templates; none for what a terminal keeps to itself."""

    name: str
    templates: tuple[str, ...]


def _table(text: str) -> dict[int, Name]:
    found = {}
    for line in text.strip().splitlines():
        tag, _, rest = line.partition(" ")
        name, _, templates = rest.partition("|")
        found[int(tag, 16)] = Name(name.strip(), tuple(templates.split()))
    return found


COMMON: Final = _table("""
42 Issuer Identification Number (IIN) | BF0C 73
4F Application Dedicated File (ADF) Name | 61
50 Application Label | 61 A5
57 Track 2 Equivalent Data | 70 77
5A Application Primary Account Number (PAN) | 70 77
5F20 Cardholder Name | 70 77
5F24 Application Expiration Date | 70 77
5F25 Application Effective Date | 70 77
5F28 Issuer Country Code | 70 77
5F2A Transaction Currency Code
5F2D Language Preference | A5
5F30 Service Code | 70 77
5F34 Application PAN Sequence Number (PSN) | 70 77
5F36 Transaction Currency Exponent
5F50 Issuer URL | BF0C 73
5F53 International Bank Account Number (IBAN) | BF0C 73
5F54 Bank Identifier Code (BIC) | BF0C 73
5F55 Issuer Country Code (alpha-2) | BF0C 73
5F56 Issuer Country Code (alpha-3) | BF0C 73
5F57 Account Type
61 Application Template | 70 73 BF0C
6F File Control Information (FCI) Template
70 READ RECORD Response Message Template
71 Issuer Script Template 1
72 Issuer Script Template 2
73 Directory Discretionary Template | 61
77 Response Message Template Format 2
7F60 Biometric Information Template (BIT) | BF4A BF4B 9F31
80 Response Message Template Format 1
81 Amount, Authorised (Binary)
82 Application Interchange Profile (AIP) | 77 80
83 Command Template
84 Dedicated File (DF) Name | 6F
86 Issuer Script Command | 71 72
87 Application Priority Indicator | 61 A5
88 Short File Identifier (SFI) | A5
89 Authorisation Code
8A Authorisation Response Code (ARC)
8C Card Risk Management Data Object List 1 (CDOL1) | 70 77
8D Card Risk Management Data Object List 2 (CDOL2) | 70 77
8E Cardholder Verification Method (CVM) List | 70 77
8F Certification Authority Public Key Index | 70 77
90 Issuer Public Key Certificate | 70 77
91 Issuer Authentication Data
92 Issuer Public Key Remainder | 70 77
93 Signed Static Application Data (SSAD) | 70 77
94 Application File Locator (AFL) | 77 80
95 Terminal Verification Results (TVR)
97 Transaction Certificate Data Object List (TDOL) | 70 77
98 Transaction Certificate (TC) Hash Value
99 Transaction PIN Data
9A Transaction Date
9B Transaction Status Information (TSI)
9C Transaction Type
9D Directory Definition File (DDF) Name | 61
9F01 Acquirer Identifier
9F02 Amount, Authorised (Numeric)
9F03 Amount, Other (Numeric)
9F04 Amount, Other (Binary)
9F05 Application Discretionary Data | 70 77
9F06 Application Identifier (AID), terminal
9F07 Application Usage Control (AUC) | 70 77
9F08 Application Version Number, card | 70 77
9F09 Application Version Number, terminal
9F0A Application Selection Registered Proprietary Data (ASRPD) | BF0C 73
9F0B Cardholder Name Extended | 70 77
9F0C Issuer Identification Number Extended (IINE) | BF0C 73
9F0D Issuer Action Code (IAC), Default | 70 77
9F0E Issuer Action Code (IAC), Denial | 70 77
9F0F Issuer Action Code (IAC), Online | 70 77
9F10 Issuer Application Data (IAD) | 77 80
9F11 Issuer Code Table Index | A5
9F12 Application Preferred Name | 61 A5
9F13 Last Online Application Transaction Counter (ATC) Register
9F14 Lower Consecutive Offline Limit (LCOL) | 70 77
9F15 Merchant Category Code (MCC)
9F16 Merchant Identifier (MID)
9F17 Personal Identification Number (PIN) Try Counter
9F18 Issuer Script Identifier | 71 72
9F19 Token Requestor ID | 70 77
9F1A Terminal Country Code
9F1B Terminal Floor Limit
9F1C Terminal Identification (TID)
9F1D Terminal Risk Management Data
9F1E Interface Device (IFD) Serial Number
9F1F Track 1 Discretionary Data | 70 77
9F20 Track 2 Discretionary Data | 70 77
9F21 Transaction Time
9F22 Certification Authority Public Key Index, terminal
9F23 Upper Consecutive Offline Limit (UCOL) | 70 77
9F24 Payment Account Reference (PAR) | 70 77
9F25 Last 4 Digits of PAN | 70 77
9F26 Application Cryptogram (AC) | 77 80
9F27 Cryptogram Information Data (CID) | 77 80
9F29 Extended Selection | 61
9F2A Kernel Identifier | 61
9F2D ICC PIN Encipherment Public Key Certificate | 70 77
9F2E ICC PIN Encipherment Public Key Exponent | 70 77
9F2F ICC PIN Encipherment Public Key Remainder | 70 77
9F30 Biometric Terminal Capabilities
9F31 Card BIT Group Template | 70 77
9F32 Issuer Public Key Exponent | 70 77
9F33 Terminal Capabilities
9F34 Cardholder Verification Method (CVM) Results
9F35 Terminal Type
9F36 Application Transaction Counter (ATC) | 77 80
9F37 Unpredictable Number (UN)
9F38 Processing Options Data Object List (PDOL) | A5
9F39 Point-of-Service (POS) Entry Mode
9F3A Amount, Reference Currency
9F3B Application Reference Currency | 70 77
9F3C Transaction Reference Currency Code
9F3D Transaction Reference Currency Exponent
9F40 Additional Terminal Capabilities
9F41 Transaction Sequence Counter
9F42 Application Currency Code | 70 77
9F43 Application Reference Currency Exponent | 70 77
9F44 Application Currency Exponent | 70 77
9F45 Data Authentication Code (DAC)
9F46 ICC Public Key Certificate | 70 77
9F47 ICC Public Key Exponent | 70 77
9F48 ICC Public Key Remainder | 70 77
9F49 Dynamic Data Authentication Data Object List (DDOL) | 70 77
9F4A Static Data Authentication Tag List | 70 77
9F4B Signed Dynamic Application Data (SDAD) | 77 80
9F4C ICC Dynamic Number
9F4D Log Entry | BF0C 73
9F4E Merchant Name and Location
9F4F Log Format
9F53 Transaction Category Code
9F5B Issuer Script Results
A1 Biometric Header Template (BHT) | 7F60
A5 File Control Information (FCI) Proprietary Template | 6F
BF0C File Control Information (FCI) Issuer Discretionary Data | A5
BF4A Offline BIT Group Template | 9F31 70
BF4B Online BIT Group Template | 9F31 70
BF4C Biometric Try Counters Template
BF4D Preferred Attempts Template
BF4E Biometric Verification Data Template
DF8120 Terminal Action Code (TAC), Default
DF8121 Terminal Action Code (TAC), Denial
DF8122 Terminal Action Code (TAC), Online
""")

KERNEL_2: Final = _table("""
56 Track 1 Data | 70
9F50 Offline Accumulator Balance
9F51 Data Recovery Data Object List (DRDOL) | 70
9F54 Data Storage ODS Card | 77
9F5B Data Storage Data Object List (DSDOL) | 70
9F5C Data Storage Requested Operator ID
9F5D Application Capabilities Information | BF0C
9F5E Data Storage ID | BF0C
9F5F Data Storage Slot Availability | BF0C
9F60 CVC3 (Track 1) | 77
9F61 CVC3 (Track 2) | 77
9F62 Track 1 Bit Map for CVC3 (PCVC3) | 70
9F63 Track 1 Bit Map for UN and ATC (PUNATC) | 70
9F64 Track 1 Number of ATC Digits (NATC) | 70
9F65 Track 2 Bit Map for CVC3 (PCVC3) | 70
9F66 Track 2 Bit Map for UN and ATC (PUNATC) | 70
9F67 Track 2 Number of ATC Digits (NATC) | 70
9F69 Unpredictable Number Data Object List (UDOL) | 70
9F6A Unpredictable Number (Numeric)
9F6B Track 2 Data | 70
9F6D Mag-stripe Application Version Number (Reader)
9F6E Third Party Data | BF0C 70
9F6F Data Storage Slot Management Control | BF0C
9F70 Protected Data Envelope 1 | BF0C
9F71 Protected Data Envelope 2 | BF0C
9F72 Protected Data Envelope 3 | BF0C
9F73 Protected Data Envelope 4 | BF0C
9F74 Protected Data Envelope 5 | BF0C
9F75 Unprotected Data Envelope 1 | BF0C
9F76 Unprotected Data Envelope 2 | BF0C
9F77 Unprotected Data Envelope 3 | BF0C
9F78 Unprotected Data Envelope 4 | BF0C
9F79 Unprotected Data Envelope 5 | BF0C
9F7C Merchant Custom Data
9F7D Data Storage Summary 1 | BF0C
9F7E Mobile Support Indicator
9F7F Data Storage Unpredictable Number | BF0C
DF4B POS Cardholder Interaction Information | 77
DF60 Data Storage Input (Card)
DF61 Data Storage Digest H
DF62 Data Storage ODS Info
DF63 Data Storage ODS Term
DF8101 Data Storage Summary 2 | 77
DF8102 Data Storage Summary 3 | 77
DF8104 Balance Read Before GENERATE AC
DF8105 Balance Read After GENERATE AC
DF8106 Data Needed
DF8107 CDOL1 Related Data
DF8108 Data Storage AC Type
DF8109 Data Storage Input (Terminal)
DF810A Data Storage ODS Info For Reader
DF810B Data Storage Summary Status
DF810C Kernel ID
DF810D Data Storage Version Number (Terminal)
DF810E Post-GENERATE AC PUT DATA Status
DF810F Pre-GENERATE AC PUT DATA Status
DF8110 Proceed To First Write Flag
DF8111 PDOL Related Data
DF8112 Tags To Read
DF8113 DRDOL Related Data
DF8114 Reference Control Parameter
DF8115 Error Indication
DF8116 User Interface Request Data
DF8117 Card Data Input Capability
DF8118 CVM Capability, CVM Required
DF8119 CVM Capability, No CVM Required
DF811A Default UDOL
DF811B Kernel Configuration
DF811C Maximum Lifetime of Torn Transaction Log Record
DF811D Maximum Number of Torn Transaction Log Records
DF811E Mag-stripe CVM Capability, CVM Required
DF811F Security Capability
DF8123 Reader Contactless Floor Limit
DF8124 Reader Contactless Transaction Limit (No On-device CVM)
DF8125 Reader Contactless Transaction Limit (On-device CVM)
DF8126 Reader CVM Required Limit
DF8127 Time Out Value
DF8128 Integrated Data Storage Status
DF8129 Outcome Parameter Set
DF812A Discretionary Data Card (Track 1)
DF812B Discretionary Data Card (Track 2)
DF812C Mag-stripe CVM Capability, No CVM Required
DF812D Message Hold Time
DF8130 Hold Time Value
DF8131 Phone Message Table
DF8132 Minimum Relay Resistance Grace Period
DF8133 Maximum Relay Resistance Grace Period
DF8134 Terminal Expected Transmission Time For Relay Resistance C-APDU
DF8135 Terminal Expected Transmission Time For Relay Resistance R-APDU
DF8136 Relay Resistance Accuracy Threshold
DF8137 Relay Resistance Transmission Time Mismatch Threshold
DF8301 Terminal Relay Resistance Entropy
DF8302 Device Relay Resistance Entropy | 80
DF8303 Minimum Time For Processing Relay Resistance APDU | 80
DF8304 Maximum Time For Processing Relay Resistance APDU | 80
DF8305 Device Estimated Transmission Time For Relay Resistance R-APDU | 80
DF8306 Measured Relay Resistance Processing Time
DF8307 Relay Resistance Protocol Counter
FF8101 Torn Record
FF8102 Tags To Write Before GENERATE AC
FF8103 Tags To Write After GENERATE AC
FF8104 Data To Send
FF8105 Data Record
FF8106 Discretionary Data
""")

KERNEL_3: Final = _table("""
9F5A Application Program Identifier | BF0C
9F5B Issuer Script Results
9F5D Available Offline Spending Amount (AOSA) | 77
9F66 Terminal Transaction Qualifiers (TTQ)
9F69 Card Authentication Related Data | 70 77
9F6C Card Transaction Qualifiers (CTQ) | 70 77
9F6E Form Factor Indicator (FFI) | 77
9F7C Customer Exclusive Data (CED) | 77
BF60 Integrated Data Storage Record Update Template
D2 Integrated Data Storage Directory | 70
""")

# Tags of the context-specific class, and of private use, mean something else inside a biometric template (Book 3, A).
_TRY_COUNTERS: Final = """
DF50 Facial {0} | {1}
DF51 Finger {0} | {1}
DF52 Iris {0} | {1}
DF53 Palm {0} | {1}
DF54 Voice {0} | {1}
"""
WITHIN: Final = {
    0xA1: _table("""
81 Biometric Type | A1
82 Biometric Subtype | A1
87 Format Owner | A1
88 Format Type | A1
90 Biometric Solution ID | A1
"""),
    0xBF4C: _table(_TRY_COUNTERS.format("Try Counter", "BF4C")),
    0xBF4D: _table(_TRY_COUNTERS.format("Preferred Attempts", "BF4D")),
    0xBF4E: _table("""
DF50 Enciphered Biometric Key Seed | BF4E
DF51 Enciphered Biometric Data | BF4E
DF52 MAC of Enciphered Biometric Data | BF4E
"""),
}
