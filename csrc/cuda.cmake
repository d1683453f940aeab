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

if(CMAKE_CUDA_COMPILER)
  # Older compilers do not know the newest architectures. Plain numbers would add PTX for each; only the
  # newest architecture keeps its PTX, for later devices.
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_version)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_version}")
  set(nvcc_version "${CMAKE_MATCH_1}")
  set(GAPO_BUILT_ARCHS "${GAPO_CUDA_ARCHS}")
  if(nvcc_version VERSION_LESS 12.8)
    list(REMOVE_ITEM GAPO_BUILT_ARCHS 100)
  endif()
  if(nvcc_version VERSION_LESS 11.8)
    list(REMOVE_ITEM GAPO_BUILT_ARCHS 90)
  endif()
  list(TRANSFORM GAPO_BUILT_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  list(GET GAPO_BUILT_ARCHS -1 newest)
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
  enable_language(CUDA)

  add_library(gapo_cuda STATIC
    csrc/cuda/plan.cpp
    csrc/cuda/combine.cu
    csrc/cuda/gramian.cu
    csrc/cuda/min_norm.cu)
  set_target_properties(gapo_cuda PROPERTIES
    CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
  target_link_libraries(gapo_cuda PRIVATE gapo_cpu)
  # The solver must round as on the host.
  set_source_files_properties(csrc/cuda/min_norm.cu PROPERTIES COMPILE_OPTIONS "--fmad=false")
  set(GAPO_CUDA_TARGET gapo_cuda)
  set(GAPO_HAS_CUDA 1)
endif()
string(REPLACE ";" "," GAPO_BUILT_ARCHS "${GAPO_BUILT_ARCHS}")
message(STATUS "gapo_mega: CUDA architectures: ${GAPO_BUILT_ARCHS}")
