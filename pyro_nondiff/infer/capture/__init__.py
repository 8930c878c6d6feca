"""Records a step as one graph of tensor operations, and runs it.

``routine`` decides for each call whether a recording serves it, by what ``variants`` know of their
signatures. ``recording`` makes one, as a function of the tensors in ``places``, which are looked up
in ``holders``. It is compared with the step itself by ``agreement``, and run by ``backends``, which
has it shortened by ``simplify`` and, if it is long, cut by ``pieces``. ``outside`` and ``reading``
stand for what a graph cannot hold. ``fused`` moves the parameters.
"""
