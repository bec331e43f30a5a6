"""What a data set is: images, labels, class names, ids and batches. Every other room reads data through this one."""

from timm_memwrap.data.classes import class_names, known_class_names
from timm_memwrap.data.images import Images, split_off
from timm_memwrap.data.opening import DIGITS, open_dataset, open_remembered, open_source
from timm_memwrap.data.pictures import SampleImages, enlarged, normalisation, picture_of, small_images, to_picture
from timm_memwrap.data.reading import SUFFIXES, ImageError, read_picture
from timm_memwrap.data.samples import Samples, encoded_batches, size_of
from timm_memwrap.data.transforms import BATCH_SIZE, batches_of, data_config, image_mode, one_by_one, to_batch

__all__ = [
    "BATCH_SIZE",
    "DIGITS",
    "SUFFIXES",
    "ImageError",
    "Images",
    "SampleImages",
    "Samples",
    "batches_of",
    "class_names",
    "data_config",
    "encoded_batches",
    "enlarged",
    "image_mode",
    "known_class_names",
    "normalisation",
    "one_by_one",
    "open_dataset",
    "open_remembered",
    "open_source",
    "picture_of",
    "read_picture",
    "size_of",
    "small_images",
    "split_off",
    "to_batch",
    "to_picture",
]
