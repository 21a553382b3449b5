// One translation unit: read vectors.h first.
#include "attention.cpp"
#include "elementwise.cpp"
#include "linear.cpp"
#include "replay.cpp"
