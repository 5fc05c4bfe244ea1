from ._library import build_info, is_compiling, is_exporting, missing  # noqa: F401
