"""What a file seems to be, from its first bytes: plain words for the usual mistakes."""

_MAGIC = (
    (b"version https://git-lfs", "this is a Git LFS pointer, not the weights: run `git lfs pull`"),
    (
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9",
        "this is a torch file of before 2020: re-save it with a newer torch or as safetensors",
    ),
    (b"PK\x03\x04", "this is a zip archive (torch .pt, .npz and .keras are): give it its own ending"),
    (b"PK\x05\x06", "this is an empty zip archive"),
    (b"\x89HDF\r\n\x1a\n", "this is an HDF5 file: name it .h5"),
    (b"\x93NUMPY", "this is a NumPy array: name it .npy"),
    (b"\x1f\x8b", "this is gzip: unpack it first"),
    (b"(\xb5/\xfd", "this is zstandard: unpack it first"),
    (b"GGUF", "this is GGUF, which is not read: use the original safetensors"),
    (b"\x7fELF", "this is a program"),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
_PICKLE = "this is a pickle, which is never read: re-save the weights as safetensors"


def explain(head, size):
    """One clause about what the file seems to be, or '' if it is not plain.

    Args:
        head: the first bytes, 512 or fewer.
        size: of the whole file, in bytes.
    """
    if size == 0:
        return "it is empty (0 bytes), an interrupted download: get it again"
    for magic, words in _MAGIC:
        if head.startswith(magic):
            return words
    if head[:100].lstrip().lower().startswith(_MARKUP):
        return "this is an HTML or XML page (an error page saved under this name?): download it again"
    if head[257:262] == b"ustar" or is_old_torch_tar(head):
        return "this is a tar archive: unpack it, or re-save with a newer torch or as safetensors"
    if len(head) > 1 and head[0] == 0x80 and 1 <= head[1] <= 5:
        return _PICKLE
    if head.count(0) == len(head):
        return "it begins with zeros only, an interrupted download: get it again"
    return ""


def is_old_torch_tar(head):
    """Whether this looks like the oldest torch format, a tar whose first member is `sys_info` or the like."""
    return head[:8] in (b"sys_info", b"storages") or head[:7] in (b"tensors", b"pickle\0")
