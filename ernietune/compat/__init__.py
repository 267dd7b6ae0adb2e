"""ERNIEKit and PaddleFormers training files, read as our configuration; no paddle."""
