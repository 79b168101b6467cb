"""What can be found in shards: the names of defects and notes, and what they mean."""

from dataclasses import dataclass

from data import images, jsonl

# What is wrong: a document is lost, was damaged, or is not what its writer meant.
DEFECTS = {
    "empty_file": "the file has 0 bytes",
    "compressed": "the file is compressed, and its name does not say so",
    "not_compressed": "the file is not compressed as its name says",
    "not_a_tar": "the file is something else than a tar",
    "unreadable": "the storage did not deliver the file",
    "cut_short": "the file ends inside a member; what follows is lost",
    "unreadable_tail": "bytes behind the last readable sample that are no shard",
    "no_end_blocks": "the zeros of an archive's end are missing; its writer was not closed",
    "no_document": "a shard without one usable document",
    "link": "a link; its data are not in the shard",
    "special_file": "a device or a pipe",
    "truncated": "a member or a line is longer than what is left of the file",
    "long_line": f"a line of more than {jsonl.LONGEST_LINE_BYTES >> 20} MiB",
    "duplicate_member": "one name twice in a sample",
    "not_adjacent": "members of other samples lie between those of this one",
    "missing_image": "no image",
    "missing_text": "no .txt, or no such field in the .json",
    "missing_json": "no .json",
    "missing_units": "no .units.npy",
    "several_images": "more than one image in a caption sample",
    "empty_text": "no text but white space",
    "not_utf8": "text that is not UTF-8",
    "nul_in_text": "NUL in the text: binary data, or UTF-16",
    "bad_text": "a text in the .json that is not a string",
    "bad_json": "not JSON",
    "bad_layout": "lists of texts and images that do not fit together, or no JSON object",
    "bad_units": "no .npy file of one row of whole numbers from 0 on",
    "bad_base64": "an image in the .json that is not base64",
    "image_header": "not an image that we read",
    "image_pixels": f"an image of more than {images.MAX_PIXELS // 10**6} million pixels",
    "image_scans": f"a JPEG of more than {images.MAX_SCANS} scans",
    "image_decode": "an image that starts well and cannot be decoded",
    "bad_index": "the index beside it is damaged, or of another version; index the shard again",
    "bad_tokens": "stored token ids that are not those of the index; index the shard again",
    "same_document": "the same key and the same bytes as in an earlier shard",
}
# What is worth knowing, though training reads the shard as it should.
NOTES = {
    "directory": "an entry that is skipped",
    "hidden_file": "a file that is skipped, such as ._NAME of a Mac",
    "odd_name": "a name that is not UTF-8, has control characters, or points outside",
    "unread_member": "members that nobody reads",
    "skipped_image": "images that a document names and the sample does not hold; the rest is read",
    "repeated_key": "the key of another document in an earlier shard",
    "gap_in_numbering": "a number that is missing between the shards",
}


@dataclass(frozen=True)
class Finding:
    """Something about a shard, or about the sample `key` of it; `reason` names it."""

    shard: str
    key: str
    reason: str
    detail: str = ""

    @property
    def is_defect(self) -> bool:
        return self.reason not in NOTES
