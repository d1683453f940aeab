# The CUDA back end is its own static library and links the runtime statically, so that the extension
# loads on machines without a driver.
set(GAPO_HAS_CUDA 0)
set(GAPO_BUILT_ARCHS "")
set(GAPO_CUDA_TARGET "")

if(NOT GAPO_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "GAPO_CUDA: found ${GAPO_CUDA}, accepted: AUTO, ON, OFF")
endif()

if(NOT GAPO_CUDA STREQUAL "OFF")
  if(DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  else()
    find_program(CMAKE_CUDA_COMPILER nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda)
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND GAPO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GAPO_CUDA=ON, but there is no nvcc: put it on PATH, set CUDACXX, or choose AUTO or OFF")
  endif()
endif()

# The architectures that a compiler knows, as a regular expression: 75|80|86.
function(gapo_known_archs compiler result)
  execute_process(COMMAND "${compiler}" --list-gpu-arch
    OUTPUT_VARIABLE listed ERROR_VARIABLE said RESULT_VARIABLE status)
  string(REGEX MATCHALL "compute_[0-9]+[a-z]?" known "${listed}")
  if(NOT status EQUAL 0 OR NOT known)
    message(FATAL_ERROR "GAPO_CUDA: ${compiler} --list-gpu-arch fails, accepted: an nvcc from CUDA 11.8 on\n${said}")
  endif()
  list(TRANSFORM known REPLACE "compute_" "")
  list(JOIN known "|" known)
  set(${result} "${known}" PARENT_SCOPE)
endfunction()

# The architectures of a list that the user gave, ascending, each once.
function(gapo_require_archs given known compiler result)
  string(REPLACE "|" ", " accepted "${known}")
  set(unknown "${given}")
  list(FILTER unknown EXCLUDE REGEX "^(${known})$")
  if(unknown OR NOT given)
    message(FATAL_ERROR "GAPO_CUDA_ARCHS: found '${given}', accepted: numbers that ${compiler} knows, separated by "
      "semicolons: ${accepted}")
  endif()
  list(REMOVE_DUPLICATES given)
  list(SORT given COMPARE NATURAL)
  set(${result} "${given}" PARENT_SCOPE)
endfunction()

if(CMAKE_CUDA_COMPILER)
  gapo_known_archs("${CMAKE_CUDA_COMPILER}" known_archs)
  if(GAPO_CUDA_ARCHS STREQUAL "DEFAULT")
    set(GAPO_BUILT_ARCHS 80 90 100)
    list(FILTER GAPO_BUILT_ARCHS INCLUDE REGEX "^(${known_archs})$")
  else()
    gapo_require_archs("${GAPO_CUDA_ARCHS}" "${known_archs}" "${CMAKE_CUDA_COMPILER}" GAPO_BUILT_ARCHS)
  endif()
  # Plain numbers would add PTX for each; only the newest architecture keeps its PTX, for later devices.
  list(TRANSFORM GAPO_BUILT_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  list(GET GAPO_BUILT_ARCHS -1 newest)
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
  enable_language(CUDA)

  add_library(gapo_cuda STATIC
    csrc/cuda/plan.cpp
    csrc/cuda/combine.cu
    csrc/cuda/gramian.cu
    csrc/cuda/min_norm.cu
    csrc/cuda/probe.cu)
  set_target_properties(gapo_cuda PROPERTIES
    CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
  target_link_libraries(gapo_cuda PRIVATE gapo_cpu)
  # The architectures of one file side by side: gramian.cu takes longer than all others together.
  target_compile_options(gapo_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=4>)
  # The solver must round as on the host.
  set_source_files_properties(csrc/cuda/min_norm.cu PROPERTIES COMPILE_OPTIONS "--fmad=false")
  set(GAPO_CUDA_TARGET gapo_cuda)
  set(GAPO_HAS_CUDA 1)
endif()
string(REPLACE ";" "," GAPO_BUILT_ARCHS "${GAPO_BUILT_ARCHS}")
message(STATUS "gapo_mega: CUDA architectures: ${GAPO_BUILT_ARCHS}")
