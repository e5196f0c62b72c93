"""Countries (ISO 3166-1), currencies (ISO 4217) and languages (ISO 639-1) by the codes that cards carry.

A terminal sells in the few currencies of `terminal.money`; a card may name any.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Named(NamedTuple):
    """A currency: its letters and how many digits its minor unit has."""

    code: str
    exponent: int


_CURRENCIES: Final = """
008 ALL 2 012 DZD 2 032 ARS 2 036 AUD 2 044 BSD 2 048 BHD 3 050 BDT 2 051 AMD 2 052 BBD 2 060 BMD 2 064 BTN 2 068 BOB 2
072 BWP 2 084 BZD 2 090 SBD 2 096 BND 2 104 MMK 2 108 BIF 0 116 KHR 2 124 CAD 2 132 CVE 2 136 KYD 2 144 LKR 2 152 CLP 0
156 CNY 2 170 COP 2 174 KMF 0 188 CRC 2 191 HRK 2 192 CUP 2 203 CZK 2 208 DKK 2 214 DOP 2 222 SVC 2 230 ETB 2 232 ERN 2
238 FKP 2 242 FJD 2 262 DJF 0 270 GMD 2 292 GIP 2 320 GTQ 2 324 GNF 0 328 GYD 2 332 HTG 2 340 HNL 2 344 HKD 2 348 HUF 2
352 ISK 0 356 INR 2 360 IDR 2 364 IRR 2 368 IQD 3 376 ILS 2 388 JMD 2 392 JPY 0 396 XAD 2 398 KZT 2 400 JOD 3 404 KES 2
408 KPW 2 410 KRW 0 414 KWD 3 417 KGS 2 418 LAK 2 422 LBP 2 426 LSL 2 430 LRD 2 434 LYD 3 446 MOP 2 454 MWK 2 458 MYR 2
462 MVR 2 480 MUR 2 484 MXN 2 496 MNT 2 498 MDL 2 504 MAD 2 512 OMR 3 516 NAD 2 524 NPR 2 532 ANG 2 533 AWG 2 548 VUV 0
554 NZD 2 558 NIO 2 566 NGN 2 578 NOK 2 586 PKR 2 590 PAB 2 598 PGK 2 600 PYG 0 604 PEN 2 608 PHP 2 634 QAR 2 643 RUB 2
646 RWF 0 654 SHP 2 682 SAR 2 690 SCR 2 702 SGD 2 704 VND 0 706 SOS 2 710 ZAR 2 728 SSP 2 748 SZL 2 752 SEK 2 756 CHF 2
760 SYP 2 764 THB 2 776 TOP 2 780 TTD 2 784 AED 2 788 TND 3 800 UGX 0 807 MKD 2 818 EGP 2 826 GBP 2 834 TZS 2 840 USD 2
858 UYU 2 860 UZS 2 882 WST 2 886 YER 2 901 TWD 2 924 ZWG 2 925 SLE 2 926 VED 2 927 UYW 4 928 VES 2 929 MRU 2 930 STN 2
931 CUC 2 932 ZWL 2 933 BYN 2 934 TMT 2 936 GHS 2 938 SDG 2 940 UYI 0 941 RSD 2 943 MZN 2 944 AZN 2 946 RON 2 947 CHE 2
948 CHW 2 949 TRY 2 950 XAF 0 951 XCD 2 952 XOF 0 953 XPF 0 960 XDR 0 967 ZMW 2 968 SRD 2 969 MGA 2 970 COU 2 971 AFN 2
972 TJS 2 973 AOA 2 975 BGN 2 976 CDF 2 977 BAM 2 978 EUR 2 979 MXV 2 980 UAH 2 981 GEL 2 984 BOV 2 985 PLN 2 986 BRL 2
990 CLF 4 997 USN 2 999 XXX 0
"""

_COUNTRIES: Final = """
004 Afghanistan|008 Albania|010 Antarctica|012 Algeria|016 American Samoa|020 Andorra|024 Angola|
028 Antigua and Barbuda|031 Azerbaijan|032 Argentina|036 Australia|040 Austria|044 Bahamas|
048 Bahrain|050 Bangladesh|051 Armenia|052 Barbados|056 Belgium|060 Bermuda|
064 Bhutan|068 Bolivia|070 Bosnia and Herzegovina|072 Botswana|074 Bouvet Island|076 Brazil|
084 Belize|086 British Indian Ocean Territory|090 Solomon Islands|092 Virgin Islands (British)|096 Brunei|100 Bulgaria|
104 Myanmar|108 Burundi|112 Belarus|116 Cambodia|120 Cameroon|124 Canada|132 Cabo Verde|136 Cayman Islands|
140 Central African Republic|144 Sri Lanka|148 Chad|152 Chile|156 China|158 Taiwan|162 Christmas Island|
166 Cocos (Keeling) Islands|170 Colombia|174 Comoros|175 Mayotte|178 Congo|180 Congo (Democratic Republic)|
184 Cook Islands|188 Costa Rica|191 Croatia|192 Cuba|196 Cyprus|203 Czechia|204 Benin|208 Denmark|212 Dominica|
214 Dominican Republic|218 Ecuador|222 El Salvador|226 Equatorial Guinea|231 Ethiopia|232 Eritrea|233 Estonia|
234 Faroe Islands|238 Falkland Islands|239 South Georgia and the South Sandwich Islands|242 Fiji|246 Finland|
248 Åland Islands|250 France|254 French Guiana|258 French Polynesia|260 French Southern Territories|262 Djibouti|
266 Gabon|268 Georgia|270 Gambia|275 Palestine|276 Germany|288 Ghana|292 Gibraltar|296 Kiribati|300 Greece|
304 Greenland|308 Grenada|312 Guadeloupe|316 Guam|320 Guatemala|324 Guinea|328 Guyana|332 Haiti|
334 Heard Island and McDonald Islands|336 Holy See|340 Honduras|344 Hong Kong|348 Hungary|352 Iceland|356 India|
360 Indonesia|364 Iran|368 Iraq|372 Ireland|376 Israel|380 Italy|384 Côte d'Ivoire|388 Jamaica|392 Japan|
398 Kazakhstan|400 Jordan|404 Kenya|408 Korea (North)|410 Korea (South)|414 Kuwait|417 Kyrgyzstan|418 Laos|
422 Lebanon|426 Lesotho|428 Latvia|430 Liberia|434 Libya|438 Liechtenstein|440 Lithuania|442 Luxembourg|446 Macao|
450 Madagascar|454 Malawi|458 Malaysia|462 Maldives|466 Mali|470 Malta|474 Martinique|478 Mauritania|480 Mauritius|
484 Mexico|492 Monaco|496 Mongolia|498 Moldova|499 Montenegro|500 Montserrat|504 Morocco|508 Mozambique|512 Oman|
516 Namibia|520 Nauru|524 Nepal|528 Netherlands|531 Curaçao|533 Aruba|534 Sint Maarten|
535 Bonaire, Sint Eustatius and Saba|540 New Caledonia|548 Vanuatu|554 New Zealand|558 Nicaragua|562 Niger|566 Nigeria|
570 Niue|574 Norfolk Island|578 Norway|580 Northern Mariana Islands|581 United States Minor Outlying Islands|
583 Micronesia|584 Marshall Islands|585 Palau|586 Pakistan|591 Panama|598 Papua New Guinea|600 Paraguay|604 Peru|
608 Philippines|612 Pitcairn|616 Poland|620 Portugal|624 Guinea-Bissau|626 Timor-Leste|630 Puerto Rico|634 Qatar|
638 Réunion|642 Romania|643 Russia|646 Rwanda|652 Saint Barthélemy|654 Saint Helena|659 Saint Kitts and Nevis|
660 Anguilla|662 Saint Lucia|663 Saint Martin|666 Saint Pierre and Miquelon|670 Saint Vincent and the Grenadines|
674 San Marino|678 Sao Tome and Principe|682 Saudi Arabia|686 Senegal|688 Serbia|690 Seychelles|694 Sierra Leone|
702 Singapore|703 Slovakia|704 Viet Nam|705 Slovenia|706 Somalia|710 South Africa|716 Zimbabwe|724 Spain|
728 South Sudan|729 Sudan|732 Western Sahara|740 Suriname|744 Svalbard and Jan Mayen|748 Eswatini|752 Sweden|
756 Switzerland|760 Syria|762 Tajikistan|764 Thailand|768 Togo|772 Tokelau|776 Tonga|780 Trinidad and Tobago|
784 United Arab Emirates|788 Tunisia|792 Türkiye|795 Turkmenistan|796 Turks and Caicos Islands|798 Tuvalu|800 Uganda|
804 Ukraine|807 North Macedonia|818 Egypt|826 United Kingdom|831 Guernsey|832 Jersey|833 Isle of Man|834 Tanzania|
840 United States|850 Virgin Islands (U.S.)|854 Burkina Faso|858 Uruguay|860 Uzbekistan|862 Venezuela|
876 Wallis and Futuna|882 Samoa|887 Yemen|894 Zambia
"""

_LANGUAGES: Final = """
ar Arabic|bg Bulgarian|ca Catalan|cs Czech|da Danish|de German|el Greek|en English|es Spanish|et Estonian|
eu Basque|fa Persian|fi Finnish|fr French|ga Irish|gl Galician|he Hebrew|hi Hindi|hr Croatian|hu Hungarian|
id Indonesian|is Icelandic|it Italian|ja Japanese|ko Korean|lt Lithuanian|lv Latvian|mk Macedonian|ms Malay|
mt Maltese|nb Norwegian Bokmål|nl Dutch|nn Norwegian Nynorsk|no Norwegian|pl Polish|pt Portuguese|rm Romansh|
ro Romanian|ru Russian|sk Slovak|sl Slovenian|sq Albanian|sr Serbian|sv Swedish|ta Tamil|th Thai|tr Turkish|
uk Ukrainian|ur Urdu|vi Vietnamese|zh Chinese
"""

_words = _CURRENCIES.split()
CURRENCIES: Final = {
    int(number): Named(code, int(exponent))
    for number, code, exponent in zip(_words[::3], _words[1::3], _words[2::3], strict=True)
}
COUNTRIES: Final = {int(entry[:3]): entry[4:] for entry in _COUNTRIES.replace("\n", "").split("|")}
LANGUAGES: Final = {entry[:2]: entry[3:] for entry in _LANGUAGES.replace("\n", "").split("|")}
