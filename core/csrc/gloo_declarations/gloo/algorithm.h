// Declarations of what ProcessGroupGloo.hpp names. libtorch holds gloo itself, and its wheel ships no headers of it; only
// pointers to these types cross, so their members are left out but for the timeouts and the store's virtual methods.
#pragma once
