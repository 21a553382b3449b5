// Recorded calls, run again: a record is the address of a kernel's packed form, and sixteen words of arguments.
#include <type_traits>
#include <utility>

union Word {
    void* pointer;
    long integer;
    float real;
    int small;
};

template <class T>
static inline T argument(const Word& word) {
    if constexpr (std::is_pointer_v<T>)
        return (T)word.pointer;
    else if constexpr (std::is_same_v<T, float>)
        return word.real;
    else if constexpr (std::is_same_v<T, int>)
        return word.small;
    else
        return word.integer;
}

template <class... T, size_t... I>
static inline void call(void (*kernel)(T...), const Word* words, std::index_sequence<I...>) {
    kernel(argument<T>(words[I])...);
}

template <class... T>
static inline void call(void (*kernel)(T...), const Word* words) {
    call(kernel, words, std::index_sequence_for<T...>{});
}

struct Call {
    void (*packed)(const Word*);
    Word words[16];
};

extern "C" void replay(const Call* calls, long count) {
    for (long i = 0; i < count; i++) calls[i].packed(calls[i].words);
}

#define PACKED(NAME) \
    extern "C" void packed_##NAME(const Word* words) { call(NAME, words); }
#define PACKED_FOR_BOTH_TYPES(NAME) PACKED(NAME##_f32) PACKED(NAME##_bf16)

PACKED_FOR_BOTH_TYPES(rms_norm)
PACKED_FOR_BOTH_TYPES(head_norm)
PACKED_FOR_BOTH_TYPES(rope_angles)
PACKED_FOR_BOTH_TYPES(rope)
PACKED_FOR_BOTH_TYPES(swiglu)
PACKED_FOR_BOTH_TYPES(reshape_and_cache)
PACKED_FOR_BOTH_TYPES(paged_attention)
PACKED(linear_f32)
PACKED(linear_f32_rows)
PACKED(linear_bf16_rows)
#if defined(__AMX_BF16__)
PACKED(linear_bf16)
#endif
