"""Records a step as one graph of tensor operations, and runs it.

``variants`` decides for each call whether a recording serves it. A recording is made by
``recording`` as a function of the tensors in ``places``, which are looked up in ``holders``. It is
compared with the step itself by ``agreement``, and run by ``backends``, which has it shortened by
``simplify`` and, if it is long, cut by ``pieces``. ``outside`` and ``reading`` stand for what a
graph cannot hold. ``fused`` moves the parameters.
"""
