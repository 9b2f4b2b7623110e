/* Counts the bytes of a process's heap, for scripts/model_scale.py: a library for LD_PRELOAD with glibc. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long now, top;

static void *counted(void *block) {
    long size = malloc_usable_size(block), total = atomic_fetch_add(&now, size) + size, most = atomic_load(&top);
    while (total > most && !atomic_compare_exchange_weak(&top, &most, total));
    return block;
}

void *malloc(size_t size) { return counted(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }

void *memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    *block = memalign(alignment, size);
    return *block ? 0 : ENOMEM;
}

void free(void *block) {
    atomic_fetch_sub(&now, malloc_usable_size(block));
    __libc_free(block);
}

void *realloc(void *block, size_t size) {
    long before = malloc_usable_size(block);
    void *moved = __libc_realloc(block, size);
    if (moved || !size) atomic_fetch_sub(&now, before);
    return moved ? counted(moved) : moved;
}

/* Returns the bytes that are allocated now. */
long memory_now(void) { return atomic_load(&now); }

/* Returns the most bytes that were allocated at once since the last call. */
long memory_top(void) { return atomic_exchange(&top, atomic_load(&now)); }
