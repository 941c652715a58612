// glide_fast._C: facts about the build, and the switch of instruction sets. Loading it registers the ops.
//
// Written against Python's limited API rather than pybind11: with torch's stable ABI one file then serves
// every Python from 3.10 and every torch from 2.10, and four small functions need no binding library.
#include <Python.h>

#include <stdexcept>
#include <string>

#include "isa.h"

namespace {

#if defined(__clang__)
constexpr const char* COMPILER = "Clang " __clang_version__;
#else
constexpr const char* COMPILER = "GCC " __VERSION__;
#endif

PyObject* capability(PyObject*, PyObject*) {
    return PyUnicode_FromString(glide_fast::current_isa().name);
}

PyObject* capabilities(PyObject*, PyObject*) {
    const auto names = glide_fast::runnable_isas();
    PyObject* result = PyTuple_New(static_cast<Py_ssize_t>(names.size()));
    if (result == nullptr) return nullptr;
    for (size_t i = 0; i < names.size(); ++i)
        PyTuple_SetItem(result, static_cast<Py_ssize_t>(i), PyUnicode_FromString(names[i].c_str()));
    return result;
}

PyObject* select(PyObject*, PyObject* argument) {
    PyObject* bytes = PyUnicode_AsUTF8String(argument);
    if (bytes == nullptr) return nullptr;
    const std::string name = PyBytes_AsString(bytes);
    Py_DECREF(bytes);
    try {
        glide_fast::select_isa(name);
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* compiler(PyObject*, PyObject*) {
    return PyUnicode_FromString(COMPILER);
}

PyMethodDef METHODS[] = {
    {"capability", capability, METH_NOARGS, "Name of the instruction set in use."},
    {"capabilities", capabilities, METH_NOARGS, "Names of those that this CPU can run, slowest first."},
    {"select", select, METH_O,
     "Use the named instruction set from now on; ValueError if it cannot run here."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built this library."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Facts about the compiled ops of glide_fast.",
                      -1,
                      METHODS,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    return PyModule_Create(&MODULE);
}
