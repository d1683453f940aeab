# One translation unit per instruction set; dispatch.cpp picks the processor's best at run time.
add_library(gapo_cpu STATIC
  csrc/runs.cpp
  csrc/cpu/baseline.cpp
  csrc/cpu/dispatch.cpp
  csrc/cpu/min_norm.cpp
  csrc/cpu/streams.cpp)
target_link_libraries(gapo_cpu PUBLIC gapo_flags Threads::Threads)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  target_sources(gapo_cpu PRIVATE csrc/cpu/avx2.cpp csrc/cpu/avx512.cpp)
  target_compile_definitions(gapo_cpu PRIVATE GAPO_X86)
  set_source_files_properties(csrc/cpu/avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  # GCC 12's own AVX-512 header triggers its maybe-uninitialized warning.
  set_source_files_properties(csrc/cpu/avx512.cpp
    PROPERTIES COMPILE_OPTIONS "-mavx512f;-mavx2;-mfma;-mf16c;-Wno-maybe-uninitialized;-Wno-uninitialized")
endif()
