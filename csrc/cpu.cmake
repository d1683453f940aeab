# One translation unit per instruction set; the best one that the processor has is picked at run time.
add_library(gapo_cpu STATIC csrc/cpu/min_norm.cpp)
target_link_libraries(gapo_cpu PUBLIC gapo_flags Threads::Threads)
