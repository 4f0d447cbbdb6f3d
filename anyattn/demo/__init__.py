"""`anyattn demo`: a real pretrained sentence encoder, on the array library of your choice.

`encoder` is the model and `text` what comes before it; `alike`, `attention_map` and `heads_page` are what is
made of its results; `command` puts them in order and prints. Nothing here is imported by the library itself.
"""
