"""The data objects of EMV: tag, format, length in bytes and source (EMV 4.4 Book 3, Annex A; Book C-n, Annex A).

A member is the tag itself, so `Tag.PAN == 0x5A` and either finds the other in a mapping. Some tags mean different
things to different kernels (9F6E is a form factor to one and third party data to another): those stand in a table of
their kernel, and `lookup` takes the kernel along. Formats matter where a DOL pads and truncates, sources where a card
answers: a card may not state what only the terminal or the issuer can.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final


class Format(Enum):
    """How a value is written (Book 3, 4.3); `b` stands for everything that is not numeric."""

    N = "n"  # decimal digits, right-justified, padded with leading zeros
    CN = "cn"  # decimal digits, left-justified, padded with trailing F
    A = "a"
    AN = "an"
    ANS = "ans"
    B = "b"


class Source(Enum):
    """Who states this data object."""

    CARD = "card"
    TERMINAL = "terminal"
    ISSUER = "issuer"


class DataObject(IntEnum):
    """A tag that knows its format, its length in bytes and its source."""

    format: Format
    length_min: int
    length_max: int
    source: Source

    def __new__(cls, tag: int, format: Format, length_min: int, length_max: int, source: Source) -> DataObject:
        member = int.__new__(cls, tag)
        member._value_ = tag
        member.format = format
        member.length_min = length_min
        member.length_max = length_max
        member.source = source
        return member


_N, _CN, _A, _AN, _ANS, _B = Format.N, Format.CN, Format.A, Format.AN, Format.ANS, Format.B
_CARD, _TERMINAL, _ISSUER = Source.CARD, Source.TERMINAL, Source.ISSUER
_ANY: Final = 252  # what a record or a response leaves for one value


class Tag(DataObject):
    """What means the same to every kernel."""

    # Templates
    APPLICATION_TEMPLATE = 0x61, _B, 0, _ANY, _CARD
    FCI_TEMPLATE = 0x6F, _B, 0, _ANY, _CARD
    RECORD_TEMPLATE = 0x70, _B, 0, _ANY, _CARD
    DIRECTORY_DISCRETIONARY_TEMPLATE = 0x73, _B, 0, _ANY, _CARD
    RESPONSE_FORMAT_2 = 0x77, _B, 0, _ANY, _CARD
    RESPONSE_FORMAT_1 = 0x80, _B, 0, _ANY, _CARD
    FCI_PROPRIETARY_TEMPLATE = 0xA5, _B, 0, _ANY, _CARD
    FCI_ISSUER_DISCRETIONARY_DATA = 0xBF0C, _B, 0, 222, _CARD
    BIOMETRIC_INFORMATION_TEMPLATE = 0x7F60, _B, 0, _ANY, _CARD
    BIOMETRIC_HEADER_TEMPLATE = 0xA1, _B, 0, _ANY, _CARD
    OFFLINE_BIT_GROUP_TEMPLATE = 0xBF4A, _B, 0, _ANY, _CARD
    ONLINE_BIT_GROUP_TEMPLATE = 0xBF4B, _B, 0, _ANY, _CARD
    BIOMETRIC_TRY_COUNTERS_TEMPLATE = 0xBF4C, _B, 0, _ANY, _CARD
    PREFERRED_ATTEMPTS_TEMPLATE = 0xBF4D, _B, 0, _ANY, _CARD
    BIOMETRIC_VERIFICATION_DATA_TEMPLATE = 0xBF4E, _B, 0, _ANY, _TERMINAL
    # Selection
    IIN = 0x42, _N, 3, 3, _CARD
    ADF_NAME = 0x4F, _B, 5, 16, _CARD
    APPLICATION_LABEL = 0x50, _ANS, 1, 16, _CARD
    DF_NAME = 0x84, _B, 5, 16, _CARD
    PRIORITY_INDICATOR = 0x87, _B, 1, 1, _CARD
    SFI = 0x88, _B, 1, 1, _CARD
    DDF_NAME = 0x9D, _B, 5, 16, _CARD
    LANGUAGE_PREFERENCE = 0x5F2D, _AN, 2, 8, _CARD
    ISSUER_URL = 0x5F50, _ANS, 0, _ANY, _CARD
    IBAN = 0x5F53, _B, 0, 34, _CARD
    BIC = 0x5F54, _B, 8, 11, _CARD
    ISSUER_COUNTRY_ALPHA2 = 0x5F55, _A, 2, 2, _CARD
    ISSUER_COUNTRY_ALPHA3 = 0x5F56, _A, 3, 3, _CARD
    IIN_EXTENDED = 0x9F0C, _N, 3, 4, _CARD
    ISSUER_CODE_TABLE_INDEX = 0x9F11, _N, 1, 1, _CARD
    PREFERRED_NAME = 0x9F12, _ANS, 1, 16, _CARD
    EXTENDED_SELECTION = 0x9F29, _B, 0, 16, _CARD
    KERNEL_IDENTIFIER = 0x9F2A, _B, 1, 8, _CARD
    PDOL = 0x9F38, _B, 0, _ANY, _CARD
    LOG_ENTRY = 0x9F4D, _B, 2, 2, _CARD
    # Application and cardholder
    TRACK_2_EQUIVALENT = 0x57, _B, 0, 19, _CARD
    PAN = 0x5A, _CN, 0, 10, _CARD
    CARDHOLDER_NAME = 0x5F20, _ANS, 2, 26, _CARD
    EXPIRATION_DATE = 0x5F24, _N, 3, 3, _CARD
    EFFECTIVE_DATE = 0x5F25, _N, 3, 3, _CARD
    ISSUER_COUNTRY_CODE = 0x5F28, _N, 2, 2, _CARD
    SERVICE_CODE = 0x5F30, _N, 2, 2, _CARD
    PAN_SEQUENCE_NUMBER = 0x5F34, _N, 1, 1, _CARD
    AIP = 0x82, _B, 2, 2, _CARD
    CDOL1 = 0x8C, _B, 0, _ANY, _CARD
    CDOL2 = 0x8D, _B, 0, _ANY, _CARD
    CVM_LIST = 0x8E, _B, 10, _ANY, _CARD
    AFL = 0x94, _B, 0, _ANY, _CARD
    TDOL = 0x97, _B, 0, _ANY, _CARD
    APPLICATION_DISCRETIONARY_DATA = 0x9F05, _B, 1, 32, _CARD
    APPLICATION_SELECTION_REGISTERED_DATA = 0x9F0A, _B, 0, _ANY, _CARD
    APPLICATION_USAGE_CONTROL = 0x9F07, _B, 2, 2, _CARD
    APPLICATION_VERSION_CARD = 0x9F08, _B, 2, 2, _CARD
    CARDHOLDER_NAME_EXTENDED = 0x9F0B, _ANS, 27, 45, _CARD
    IAC_DEFAULT = 0x9F0D, _B, 5, 5, _CARD
    IAC_DENIAL = 0x9F0E, _B, 5, 5, _CARD
    IAC_ONLINE = 0x9F0F, _B, 5, 5, _CARD
    LAST_ONLINE_ATC = 0x9F13, _B, 2, 2, _CARD
    LOWER_CONSECUTIVE_OFFLINE_LIMIT = 0x9F14, _B, 1, 1, _CARD
    PIN_TRY_COUNTER = 0x9F17, _B, 1, 1, _CARD
    TOKEN_REQUESTOR_ID = 0x9F19, _N, 6, 6, _CARD
    TRACK_1_DISCRETIONARY_DATA = 0x9F1F, _ANS, 0, _ANY, _CARD
    TRACK_2_DISCRETIONARY_DATA = 0x9F20, _CN, 0, _ANY, _CARD
    UPPER_CONSECUTIVE_OFFLINE_LIMIT = 0x9F23, _B, 1, 1, _CARD
    PAYMENT_ACCOUNT_REFERENCE = 0x9F24, _AN, 29, 29, _CARD
    LAST_4_DIGITS_OF_PAN = 0x9F25, _N, 2, 2, _CARD
    CARD_BIT_GROUP_TEMPLATE = 0x9F31, _B, 0, _ANY, _CARD
    APPLICATION_REFERENCE_CURRENCY = 0x9F3B, _N, 2, 8, _CARD
    APPLICATION_CURRENCY_CODE = 0x9F42, _N, 2, 2, _CARD
    APPLICATION_REFERENCE_CURRENCY_EXPONENT = 0x9F43, _N, 1, 4, _CARD
    APPLICATION_CURRENCY_EXPONENT = 0x9F44, _N, 1, 1, _CARD
    LOG_FORMAT = 0x9F4F, _B, 0, _ANY, _CARD
    # Cryptogram and offline data authentication
    CA_PUBLIC_KEY_INDEX = 0x8F, _B, 1, 1, _CARD
    ISSUER_CERTIFICATE = 0x90, _B, 0, 248, _CARD
    ISSUER_REMAINDER = 0x92, _B, 0, 248, _CARD
    SIGNED_STATIC_DATA = 0x93, _B, 0, 248, _CARD
    ISSUER_APPLICATION_DATA = 0x9F10, _B, 0, 32, _CARD
    CRYPTOGRAM = 0x9F26, _B, 8, 8, _CARD
    CRYPTOGRAM_INFORMATION = 0x9F27, _B, 1, 1, _CARD
    PIN_CERTIFICATE = 0x9F2D, _B, 0, 248, _CARD
    PIN_EXPONENT = 0x9F2E, _B, 1, 3, _CARD
    PIN_REMAINDER = 0x9F2F, _B, 0, 248, _CARD
    ISSUER_EXPONENT = 0x9F32, _B, 1, 3, _CARD
    ATC = 0x9F36, _B, 2, 2, _CARD
    DATA_AUTHENTICATION_CODE = 0x9F45, _B, 2, 2, _CARD
    ICC_CERTIFICATE = 0x9F46, _B, 0, 248, _CARD
    ICC_EXPONENT = 0x9F47, _B, 1, 3, _CARD
    ICC_REMAINDER = 0x9F48, _B, 0, 248, _CARD
    DDOL = 0x9F49, _B, 0, _ANY, _CARD
    STATIC_DATA_TAG_LIST = 0x9F4A, _B, 0, _ANY, _CARD
    SIGNED_DYNAMIC_DATA = 0x9F4B, _B, 0, 248, _CARD
    ICC_DYNAMIC_NUMBER = 0x9F4C, _B, 2, 8, _CARD
    # Terminal
    AMOUNT_AUTHORISED_BINARY = 0x81, _B, 4, 4, _TERMINAL
    COMMAND_TEMPLATE = 0x83, _B, 0, _ANY, _TERMINAL
    TVR = 0x95, _B, 5, 5, _TERMINAL
    TRANSACTION_PIN_DATA = 0x99, _B, 0, _ANY, _TERMINAL
    TC_HASH = 0x98, _B, 20, 20, _TERMINAL
    TRANSACTION_DATE = 0x9A, _N, 3, 3, _TERMINAL
    TSI = 0x9B, _B, 2, 2, _TERMINAL
    TRANSACTION_TYPE = 0x9C, _N, 1, 1, _TERMINAL
    TRANSACTION_CURRENCY_CODE = 0x5F2A, _N, 2, 2, _TERMINAL
    TRANSACTION_CURRENCY_EXPONENT = 0x5F36, _N, 1, 1, _TERMINAL
    ACCOUNT_TYPE = 0x5F57, _N, 1, 1, _TERMINAL
    ACQUIRER_IDENTIFIER = 0x9F01, _N, 6, 6, _TERMINAL
    AMOUNT_AUTHORISED = 0x9F02, _N, 6, 6, _TERMINAL
    AMOUNT_OTHER = 0x9F03, _N, 6, 6, _TERMINAL
    AMOUNT_OTHER_BINARY = 0x9F04, _B, 4, 4, _TERMINAL
    AID = 0x9F06, _B, 5, 16, _TERMINAL
    APPLICATION_VERSION_TERMINAL = 0x9F09, _B, 2, 2, _TERMINAL
    MCC = 0x9F15, _N, 2, 2, _TERMINAL
    MERCHANT_IDENTIFIER = 0x9F16, _ANS, 15, 15, _TERMINAL
    TERMINAL_COUNTRY_CODE = 0x9F1A, _N, 2, 2, _TERMINAL
    TERMINAL_FLOOR_LIMIT = 0x9F1B, _B, 4, 4, _TERMINAL
    TERMINAL_IDENTIFICATION = 0x9F1C, _AN, 8, 8, _TERMINAL
    TERMINAL_RISK_MANAGEMENT_DATA = 0x9F1D, _B, 1, 8, _TERMINAL
    IFD_SERIAL_NUMBER = 0x9F1E, _AN, 8, 8, _TERMINAL
    TRANSACTION_TIME = 0x9F21, _N, 3, 3, _TERMINAL
    TERMINAL_CA_PUBLIC_KEY_INDEX = 0x9F22, _B, 1, 1, _TERMINAL
    BIOMETRIC_TERMINAL_CAPABILITIES = 0x9F30, _B, 3, 3, _TERMINAL
    TERMINAL_CAPABILITIES = 0x9F33, _B, 3, 3, _TERMINAL
    CVM_RESULTS = 0x9F34, _B, 3, 3, _TERMINAL
    TERMINAL_TYPE = 0x9F35, _N, 1, 1, _TERMINAL
    UNPREDICTABLE_NUMBER = 0x9F37, _B, 4, 4, _TERMINAL
    POS_ENTRY_MODE = 0x9F39, _N, 1, 1, _TERMINAL
    AMOUNT_REFERENCE_CURRENCY = 0x9F3A, _B, 4, 4, _TERMINAL
    REFERENCE_CURRENCY_CODE = 0x9F3C, _N, 2, 2, _TERMINAL
    REFERENCE_CURRENCY_EXPONENT = 0x9F3D, _N, 1, 1, _TERMINAL
    ADDITIONAL_TERMINAL_CAPABILITIES = 0x9F40, _B, 5, 5, _TERMINAL
    TRANSACTION_SEQUENCE_COUNTER = 0x9F41, _N, 2, 4, _TERMINAL
    MERCHANT_NAME_AND_LOCATION = 0x9F4E, _ANS, 0, _ANY, _TERMINAL
    TRANSACTION_CATEGORY_CODE = 0x9F53, _AN, 1, 1, _TERMINAL
    # Issuer
    ISSUER_SCRIPT_1 = 0x71, _B, 0, _ANY, _ISSUER
    ISSUER_SCRIPT_2 = 0x72, _B, 0, _ANY, _ISSUER
    ISSUER_SCRIPT_COMMAND = 0x86, _B, 0, 261, _ISSUER
    AUTHORISATION_CODE = 0x89, _AN, 6, 6, _ISSUER
    AUTHORISATION_RESPONSE_CODE = 0x8A, _AN, 2, 2, _ISSUER
    ISSUER_AUTHENTICATION_DATA = 0x91, _B, 8, 16, _ISSUER
    ISSUER_SCRIPT_IDENTIFIER = 0x9F18, _B, 4, 4, _ISSUER
    ISSUER_SCRIPT_RESULTS = 0x9F5B, _B, 0, _ANY, _TERMINAL


class ActionCode(DataObject):
    """Terminal action codes. The books give them no tag; kernel 2's serve for contact, too (C-2, A.1)."""

    DEFAULT = 0xDF8120, _B, 5, 5, _TERMINAL
    DENIAL = 0xDF8121, _B, 5, 5, _TERMINAL
    ONLINE = 0xDF8122, _B, 5, 5, _TERMINAL


class Kernel2Tag(DataObject):
    """What these tags mean to kernel 2 (Book C-2, Annex A)."""

    TRACK_1_DATA = 0x56, _ANS, 0, 76, _CARD
    OFFLINE_ACCUMULATOR_BALANCE = 0x9F50, _N, 6, 6, _CARD
    DRDOL = 0x9F51, _B, 0, 250, _CARD
    DS_ODS_CARD = 0x9F54, _B, 0, 160, _CARD
    DSDOL = 0x9F5B, _B, 0, 250, _CARD
    DS_REQUESTED_OPERATOR_ID = 0x9F5C, _B, 8, 8, _TERMINAL
    APPLICATION_CAPABILITIES = 0x9F5D, _B, 3, 3, _CARD
    DS_ID = 0x9F5E, _N, 8, 11, _CARD
    DS_SLOT_AVAILABILITY = 0x9F5F, _B, 1, 1, _CARD
    CVC3_TRACK_1 = 0x9F60, _B, 2, 2, _CARD
    CVC3_TRACK_2 = 0x9F61, _B, 2, 2, _CARD
    PCVC3_TRACK_1 = 0x9F62, _B, 6, 6, _CARD
    PUNATC_TRACK_1 = 0x9F63, _B, 6, 6, _CARD
    NATC_TRACK_1 = 0x9F64, _B, 1, 1, _CARD
    PCVC3_TRACK_2 = 0x9F65, _B, 2, 2, _CARD
    PUNATC_TRACK_2 = 0x9F66, _B, 2, 2, _CARD
    NATC_TRACK_2 = 0x9F67, _B, 1, 1, _CARD
    UDOL = 0x9F69, _B, 0, 250, _CARD
    UNPREDICTABLE_NUMBER_NUMERIC = 0x9F6A, _N, 4, 4, _TERMINAL
    TRACK_2_DATA = 0x9F6B, _B, 0, 19, _CARD
    MAG_STRIPE_VERSION = 0x9F6D, _B, 2, 2, _TERMINAL
    THIRD_PARTY_DATA = 0x9F6E, _B, 5, 32, _CARD
    DS_SLOT_CONTROL = 0x9F6F, _B, 1, 1, _CARD
    PROTECTED_ENVELOPE_1 = 0x9F70, _B, 0, 192, _CARD
    PROTECTED_ENVELOPE_2 = 0x9F71, _B, 0, 192, _CARD
    PROTECTED_ENVELOPE_3 = 0x9F72, _B, 0, 192, _CARD
    PROTECTED_ENVELOPE_4 = 0x9F73, _B, 0, 192, _CARD
    PROTECTED_ENVELOPE_5 = 0x9F74, _B, 0, 192, _CARD
    UNPROTECTED_ENVELOPE_1 = 0x9F75, _B, 0, 192, _CARD
    UNPROTECTED_ENVELOPE_2 = 0x9F76, _B, 0, 192, _CARD
    UNPROTECTED_ENVELOPE_3 = 0x9F77, _B, 0, 192, _CARD
    UNPROTECTED_ENVELOPE_4 = 0x9F78, _B, 0, 192, _CARD
    UNPROTECTED_ENVELOPE_5 = 0x9F79, _B, 0, 192, _CARD
    MERCHANT_CUSTOM_DATA = 0x9F7C, _B, 20, 20, _TERMINAL
    DS_SUMMARY_1 = 0x9F7D, _B, 8, 16, _CARD
    MOBILE_SUPPORT_INDICATOR = 0x9F7E, _B, 1, 1, _TERMINAL
    DS_UNPREDICTABLE_NUMBER = 0x9F7F, _B, 4, 4, _CARD
    POS_CARDHOLDER_INTERACTION = 0xDF4B, _B, 3, 3, _CARD
    DS_INPUT_CARD = 0xDF60, _B, 8, 8, _TERMINAL
    DS_DIGEST_H = 0xDF61, _B, 8, 8, _TERMINAL
    DS_ODS_INFO = 0xDF62, _B, 1, 1, _TERMINAL
    DS_ODS_TERM = 0xDF63, _B, 0, 160, _TERMINAL
    DS_SUMMARY_2 = 0xDF8101, _B, 8, 16, _CARD
    DS_SUMMARY_3 = 0xDF8102, _B, 8, 16, _CARD
    BALANCE_BEFORE = 0xDF8104, _N, 0, 6, _TERMINAL  # there: read it; then the balance
    BALANCE_AFTER = 0xDF8105, _N, 0, 6, _TERMINAL
    DATA_NEEDED = 0xDF8106, _B, 0, _ANY, _TERMINAL
    CDOL1_RELATED_DATA = 0xDF8107, _B, 0, _ANY, _TERMINAL
    DS_AC_TYPE = 0xDF8108, _B, 1, 1, _TERMINAL
    DS_INPUT_TERM = 0xDF8109, _B, 8, 8, _TERMINAL
    DS_ODS_INFO_FOR_READER = 0xDF810A, _B, 1, 1, _TERMINAL
    DS_SUMMARY_STATUS = 0xDF810B, _B, 1, 1, _TERMINAL
    KERNEL_ID = 0xDF810C, _B, 1, 1, _TERMINAL
    DSVN_TERM = 0xDF810D, _B, 0, _ANY, _TERMINAL
    POST_PUT_DATA_STATUS = 0xDF810E, _B, 1, 1, _TERMINAL
    PRE_PUT_DATA_STATUS = 0xDF810F, _B, 1, 1, _TERMINAL
    PROCEED_TO_FIRST_WRITE = 0xDF8110, _B, 1, 1, _TERMINAL
    PDOL_RELATED_DATA = 0xDF8111, _B, 0, _ANY, _TERMINAL
    TAGS_TO_READ = 0xDF8112, _B, 0, _ANY, _TERMINAL
    DRDOL_RELATED_DATA = 0xDF8113, _B, 0, _ANY, _TERMINAL
    REFERENCE_CONTROL_PARAMETER = 0xDF8114, _B, 1, 1, _TERMINAL
    ERROR_INDICATION = 0xDF8115, _B, 6, 6, _TERMINAL
    USER_INTERFACE_REQUEST = 0xDF8116, _B, 22, 22, _TERMINAL
    CARD_DATA_INPUT_CAPABILITY = 0xDF8117, _B, 1, 1, _TERMINAL
    CVM_CAPABILITY_ABOVE_LIMIT = 0xDF8118, _B, 1, 1, _TERMINAL
    CVM_CAPABILITY_BELOW_LIMIT = 0xDF8119, _B, 1, 1, _TERMINAL
    DEFAULT_UDOL = 0xDF811A, _B, 3, 3, _TERMINAL
    KERNEL_CONFIGURATION = 0xDF811B, _B, 1, 1, _TERMINAL
    TORN_LIFETIME = 0xDF811C, _B, 2, 2, _TERMINAL  # in seconds
    TORN_RECORDS_MAX = 0xDF811D, _B, 1, 1, _TERMINAL
    MAG_STRIPE_CVM_ABOVE_LIMIT = 0xDF811E, _B, 1, 1, _TERMINAL
    SECURITY_CAPABILITY = 0xDF811F, _B, 1, 1, _TERMINAL
    FLOOR_LIMIT = 0xDF8123, _N, 6, 6, _TERMINAL
    TRANSACTION_LIMIT = 0xDF8124, _N, 6, 6, _TERMINAL  # without on-device cardholder verification
    TRANSACTION_LIMIT_ON_DEVICE_CVM = 0xDF8125, _N, 6, 6, _TERMINAL
    CVM_REQUIRED_LIMIT = 0xDF8126, _N, 6, 6, _TERMINAL
    TIME_OUT = 0xDF8127, _B, 2, 2, _TERMINAL  # in ms
    IDS_STATUS = 0xDF8128, _B, 1, 1, _TERMINAL
    OUTCOME_PARAMETER_SET = 0xDF8129, _B, 8, 8, _TERMINAL
    DD_CARD_TRACK_1 = 0xDF812A, _ANS, 0, 56, _TERMINAL
    DD_CARD_TRACK_2 = 0xDF812B, _CN, 0, 11, _TERMINAL
    MAG_STRIPE_CVM_BELOW_LIMIT = 0xDF812C, _B, 1, 1, _TERMINAL
    MESSAGE_HOLD_TIME = 0xDF812D, _N, 3, 3, _TERMINAL  # in 100 ms
    HOLD_TIME = 0xDF8130, _B, 1, 1, _TERMINAL  # in 100 ms
    PHONE_MESSAGE_TABLE = 0xDF8131, _B, 0, _ANY, _TERMINAL
    RELAY_GRACE_MIN = 0xDF8132, _B, 2, 2, _TERMINAL  # times of relay resistance in 0.1 ms
    RELAY_GRACE_MAX = 0xDF8133, _B, 2, 2, _TERMINAL
    EXPECTED_COMMAND_TIME = 0xDF8134, _B, 2, 2, _TERMINAL
    EXPECTED_RESPONSE_TIME = 0xDF8135, _B, 2, 2, _TERMINAL
    RELAY_ACCURACY_THRESHOLD = 0xDF8136, _B, 2, 2, _TERMINAL
    RELAY_MISMATCH_THRESHOLD = 0xDF8137, _B, 1, 1, _TERMINAL  # in percent
    TERMINAL_RELAY_ENTROPY = 0xDF8301, _B, 4, 4, _TERMINAL
    DEVICE_RELAY_ENTROPY = 0xDF8302, _B, 4, 4, _CARD
    RELAY_TIME_MIN = 0xDF8303, _B, 2, 2, _CARD
    RELAY_TIME_MAX = 0xDF8304, _B, 2, 2, _CARD
    RELAY_RESPONSE_TIME_ESTIMATE = 0xDF8305, _B, 2, 2, _CARD
    RELAY_TIME_MEASURED = 0xDF8306, _B, 2, 2, _TERMINAL
    RELAY_COUNTER = 0xDF8307, _B, 1, 1, _TERMINAL
    TORN_RECORD = 0xFF8101, _B, 0, _ANY, _TERMINAL
    TAGS_TO_WRITE_BEFORE = 0xFF8102, _B, 0, _ANY, _TERMINAL
    TAGS_TO_WRITE_AFTER = 0xFF8103, _B, 0, _ANY, _TERMINAL
    DATA_TO_SEND = 0xFF8104, _B, 0, _ANY, _TERMINAL
    DATA_RECORD = 0xFF8105, _B, 0, _ANY, _TERMINAL
    DISCRETIONARY_DATA = 0xFF8106, _B, 0, _ANY, _TERMINAL


class Kernel3Tag(DataObject):
    """What these tags mean to kernel 3 (Book C-3, Annex A)."""

    APPLICATION_PROGRAM_IDENTIFIER = 0x9F5A, _B, 1, 16, _CARD
    AVAILABLE_OFFLINE_SPENDING_AMOUNT = 0x9F5D, _N, 6, 6, _CARD
    TTQ = 0x9F66, _B, 4, 4, _TERMINAL
    CARD_AUTHENTICATION_RELATED_DATA = 0x9F69, _B, 5, 16, _CARD
    CTQ = 0x9F6C, _B, 2, 2, _CARD
    FORM_FACTOR_INDICATOR = 0x9F6E, _B, 4, 4, _CARD
    CUSTOMER_EXCLUSIVE_DATA = 0x9F7C, _B, 0, 32, _CARD
    IDS_RECORD_UPDATE_TEMPLATE = 0xBF60, _B, 0, _ANY, _TERMINAL
    IDS_DIRECTORY = 0xD2, _B, 0, _ANY, _CARD


_COMMON: Final[dict[int, DataObject]] = {int(tag): tag for table in (Tag, ActionCode) for tag in table}
_BY_KERNEL: Final[dict[int, dict[int, DataObject]]] = {
    2: {int(tag): tag for tag in Kernel2Tag},
    3: {int(tag): tag for tag in Kernel3Tag},
}


def lookup(tag: int, kernel: int | None = None) -> DataObject | None:
    """What `tag` means, to this kernel first; None for a tag that nobody here knows."""
    return _BY_KERNEL.get(kernel or 0, {}).get(tag) or _COMMON.get(tag)
