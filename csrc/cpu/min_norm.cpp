int gapo_placeholder;
