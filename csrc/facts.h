// A state of Python's objects, compared by identity: whether what was found of a patched layer may be used again
// (peftkern/integrations/peft/memo.py, whose Facts this reads).
#pragma once
#include <pybind11/pybind11.h>

namespace peftkern {

class Facts {
 public:
  explicit Facts(const pybind11::tuple &columns) : columns_(columns.ptr()) {
    if (PyTuple_GET_SIZE(columns_) != 6) throw pybind11::value_error("facts have six columns");
  }

  bool hold() const {
    return all(0, 3, [](PyObject **f) { return same(f[0], f[1], f[2]); }) &&
           all(1, 2, [](PyObject **f) { return at(f[0], f[1]) == nullptr; }) &&
           all(2, 2, [](PyObject **f) { return empty(at(f[0], f[1])); }) &&
           all(3, 2, [](PyObject **f) { return (PyObject *)Py_TYPE(f[0]) == f[1]; }) &&
           all(4, 2, [](PyObject **f) { return PyList_Check(f[0]) && PyList_GET_SIZE(f[0]) == 1 && PyList_GET_ITEM(f[0], 0) == f[1]; }) &&
           all(5, 3, [](PyObject **f) { return equal(f[0], f[1], f[2]); });
  }

 private:
  // A borrowed entry, or null.
  static PyObject *at(PyObject *dict, PyObject *key) {
    if (!PyDict_Check(dict)) throw pybind11::type_error("facts look keys up in dicts");
    PyObject *found = PyDict_GetItemWithError(dict, key);
    if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return found;
  }
  static bool same(PyObject *dict, PyObject *key, PyObject *value) {
    PyObject *found = at(dict, key);
    return found == value || (found == nullptr && value == Py_None);
  }
  static bool empty(PyObject *value) {
    if (value == nullptr || value == Py_False || value == Py_None) return true;
    if (PyDict_Check(value)) return PyDict_GET_SIZE(value) == 0;
    if (PyList_Check(value)) return PyList_GET_SIZE(value) == 0;
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw pybind11::error_already_set();
    return truth == 0;
  }
  static bool equal(PyObject *object, PyObject *name, PyObject *value) {
    const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(object, name));
    if (!found) throw pybind11::error_already_set();
    if (found.ptr() == value) return true;
    const int same = PyObject_RichCompareBool(found.ptr(), value, Py_EQ);
    if (same < 0) throw pybind11::error_already_set();
    return same == 1;
  }

  template <class Fact> bool all(Py_ssize_t column, Py_ssize_t width, Fact fact) const {
    PyObject *flat = PyTuple_GET_ITEM(columns_, column);
    if (!PyTuple_Check(flat) || PyTuple_GET_SIZE(flat) % width) throw pybind11::value_error("a column of facts is a tuple of whole facts");
    PyObject **begin = &PyTuple_GET_ITEM(flat, 0);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(flat); i += width) {
      if (!fact(begin + i)) return false;
    }
    return true;
  }

  PyObject *columns_;  // the caller's
};

}  // namespace peftkern
