"""The steps by the name that a config gives them: module and class; an import waits for its use."""

STEPS = {
    "repair": "repair:Repair",
    "language": "language:Language",
    "length": "length:Length",
    "gopher_quality": "gopher:GopherQuality",
    "gopher_repetition": "repetition:GopherRepetition",
    "c4": "c4:C4",
    "fineweb": "fineweb:FineWeb",
    "mask": "mask:Mask",
    "urls": "urls:Urls",
    "classifier": "classifier:Classifier",
    "decontaminate": "decontaminate:Decontaminate",
}
