// glide_fast._cuda: which GPUs the kernels of csrc/cuda were compiled for. Loading it registers their ops.
#include <Python.h>

namespace {

PyObject* architectures(PyObject*, PyObject*) {
    return PyUnicode_FromString(GLIDE_FAST_ARCHITECTURES);
}

PyMethodDef METHODS[] = {
    {"architectures", architectures, METH_NOARGS, "The GPUs that there is code for, \"sm_80, sm_90a\"."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT,
                      "_cuda",
                      "Facts about the CUDA kernels of glide_fast.",
                      -1,
                      METHODS,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
    return PyModule_Create(&MODULE);
}
