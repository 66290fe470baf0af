/* HCCL among the processes of one machine: every operation is made of messages, a message is a file in /dev/shm.
 *
 * An operation is finished when the call returns, but for a receive: it takes its message when its stream is waited for
 * (an event recorded on it, or a synchronisation), so that receives may be posted before the sends. Reductions add in the order of ranks, 16-bit
 * floats in float. Like the real library it takes fp64 for moving data; torch_npu refuses it for reductions itself.
 * A message that does not come within NPU_STUB_TIMEOUT seconds (default 120) is HCCL_E_TIMEOUT.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, PARAMETER = 1, MEMORY = 3, TIMEOUT = 9, TRANSFER = 13 };
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BF16 };
enum { SUM, PROD, MAX, MIN };
enum { MAX_RANKS = 256 };

static const size_t SIZES[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};

#define TRY(call) do { int error = (call); if (error) return error; } while (0)

typedef struct {
    char id[64];
    uint32_t size, rank;
    uint64_t sent[MAX_RANKS], received[MAX_RANKS];  /* messages to and from each rank so far */
} Comm;

/* Messages. */

static void message_path(char *path, size_t limit, const Comm *c, uint32_t from, uint32_t to, uint64_t number) {
    snprintf(path, limit, "/dev/shm/npu_stub.%s.%u.%u.%llu", c->id, from, to, (unsigned long long)number);
}

int npu_stub_finish_receives(void *stream, const char *data, size_t size);

static int send_to(Comm *c, uint32_t to, const void *data, size_t size) {
    char path[192], hidden[200];
    TRY(npu_stub_finish_receives(NULL, data, size));
    message_path(path, sizeof path, c, c->rank, to, c->sent[to]++);
    snprintf(hidden, sizeof hidden, "%s.part", path);
    FILE *file = fopen(hidden, "wb");
    if (!file) return TRANSFER;
    size_t written = fwrite(data, 1, size, file);
    if (fclose(file) || written != size) return TRANSFER;
    return rename(hidden, path) ? TRANSFER : OK;
}

static int take(const char *path, void *data, size_t size) {
    const char *limit = getenv("NPU_STUB_TIMEOUT");
    time_t deadline = time(NULL) + (limit ? atol(limit) : 120);
    FILE *file;
    for (unsigned wait = 20; !(file = fopen(path, "rb")); wait += wait < 1000 ? wait / 4 : 0) {
        if (time(NULL) > deadline) return TIMEOUT;
        usleep(wait);
    }
    size_t read = fread(data, 1, size, file);
    int whole = read == size && fgetc(file) == EOF;
    fclose(file);
    unlink(path);
    return whole ? OK : TRANSFER;  /* the two ranks do not agree about the length */
}

static int receive_from(Comm *c, uint32_t from, void *data, size_t size) {
    char path[192];
    message_path(path, sizeof path, c, from, c->rank, c->received[from]++);
    return take(path, data, size);
}

/* Receives that have been posted and not waited for, oldest first. */

typedef struct Posted {
    char path[192];
    char *data;
    size_t size;
    void *stream;
    struct Posted *next;
} Posted;

static Posted *posted;
static pthread_mutex_t posted_lock = PTHREAD_MUTEX_INITIALIZER;  /* torch_npu's watchdog asks from a thread of its own */

static int post_receive(Comm *c, uint32_t from, void *data, size_t size, void *stream) {
    Posted *item = calloc(1, sizeof *item), **end = &posted;
    if (!item) return MEMORY;
    message_path(item->path, sizeof item->path, c, from, c->rank, c->received[from]++);
    item->data = data, item->size = size, item->stream = stream;
    pthread_mutex_lock(&posted_lock);
    while (*end) end = &(*end)->next;
    *end = item;
    pthread_mutex_unlock(&posted_lock);
    return OK;
}

/* Finish the receives of a stream (NULL: of all), or those that write what lies from data to data + size. */
int npu_stub_finish_receives(void *stream, const char *data, size_t size) {
    int error = OK;
    pthread_mutex_lock(&posted_lock);
    for (Posted **at = &posted; *at;) {
        Posted *item = *at;
        int overlaps = data && item->data < data + size && data < item->data + item->size;
        if (data ? !overlaps : stream && item->stream != stream) {
            at = &item->next;
            continue;
        }
        *at = item->next;
        int own = take(item->path, item->data, item->size);
        error = error ? error : own;
        free(item);
    }
    pthread_mutex_unlock(&posted_lock);
    return error;
}

int npu_stub_is_receiving(void *stream) {
    int found = 0;
    if (pthread_mutex_trylock(&posted_lock)) return 1;
    for (Posted *item = posted; item; item = item->next) found |= item->stream == stream;
    pthread_mutex_unlock(&posted_lock);
    return found;
}

/* Arithmetic: everything is added up as double or int64 and rounded once. */

static double half_to_double(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
}

static double bfloat_to_double(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#define COMBINE(type, a, b) \
    (op == SUM ? (type)(a + b) : op == PROD ? (type)(a * b) : op == MAX ? (a > b ? a : b) : (a < b ? a : b))
#define REDUCE(type)                                                                    \
    for (size_t i = 0; i < count; i++) {                                                \
        type a = ((type *)into)[i], b = ((const type *)from)[i];                        \
        ((type *)into)[i] = COMBINE(type, a, b);                                        \
    }                                                                                   \
    return OK;

/* into = into op from; 16-bit floats are held as float in both. */
static int reduce(void *into, const void *from, size_t count, int type, int op) {
    switch (type) {
        case INT8: REDUCE(int8_t)
        case INT16: REDUCE(int16_t)
        case INT32: REDUCE(int32_t)
        case INT64: REDUCE(int64_t)
        case UINT8: REDUCE(uint8_t)
        case UINT64: REDUCE(uint64_t)
        case FP64: REDUCE(double)
        case FP16: case BF16: case FP32: REDUCE(float)
    }
    return PARAMETER;
}

static void *widened(const void *data, size_t count, int type) {
    size_t size = type == FP16 || type == BF16 ? 4 : SIZES[type];
    void *copy = malloc(count * size + 1);
    if (copy && size == SIZES[type]) memcpy(copy, data, count * size);
    for (size_t i = 0; copy && size != SIZES[type] && i < count; i++) {
        uint16_t bits = ((const uint16_t *)data)[i];
        ((float *)copy)[i] = type == FP16 ? half_to_double(bits) : bfloat_to_double(bits);
    }
    return copy;
}

static void narrowed(void *data, const void *wide, size_t count, int type) {
    if (type != FP16 && type != BF16) {
        memcpy(data, wide, count * SIZES[type]);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        float value = ((const float *)wide)[i];
        _Float16 half = value;
        if (type == FP16) memcpy((uint16_t *)data + i, &half, 2);
        else ((uint16_t *)data)[i] = to_bfloat(value);
    }
}

/* Communicators. */

int HcclGetRootInfo(void *info) {
    static int number;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(info, sizeof((Comm *)0)->id, "%d.%lld.%ld.%d", getpid(), (long long)now.tv_sec, now.tv_nsec, number++);
    return OK;
}

int HcclCommInitRootInfo(uint32_t size, const void *info, uint32_t rank, void **comm) {
    Comm *c = calloc(1, sizeof *c);
    if (!c || size > MAX_RANKS || rank >= size) return PARAMETER;
    strncpy(c->id, info, sizeof c->id - 1);
    c->size = size;
    c->rank = rank;
    *comm = c;
    return OK;
}

int HcclCommInitRootInfoConfig(uint32_t size, const void *info, uint32_t rank, const void *config, void **comm) {
    /* HcclCommConfig: 8 bytes of size, magic word, version and reserved words (24 in all), then the buffer size in MB. */
    const char *log = getenv("NPU_STUB_COMMUNICATORS");
    FILE *file = log && *log ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%u %u %u\n", size, rank, *(const uint32_t *)((const char *)config + 24));
        fclose(file);
    }
    return HcclCommInitRootInfo(size, info, rank, comm);
}

/* CANN 9 on 910B and 910C: torch_npu posts the messages of a batch one by one between these. */
int HcclGroupStart(void) { return OK; }
int HcclGroupEnd(void) { return OK; }

int HcclCommDestroy(void *comm) { free(comm); return OK; }
int HcclGetCommName(void *comm, char *name) { strcpy(name, ((Comm *)comm)->id); return OK; }
int HcclGetCommAsyncError(void *comm, int *error) { *error = OK; return OK; }

/* Operations. */


int HcclSend(void *data, uint64_t count, int type, uint32_t to, void *comm, void *stream) {
    return send_to(comm, to, data, count * SIZES[type]);
}

int HcclRecv(void *data, uint64_t count, int type, uint32_t from, void *comm, void *stream) {
    return post_receive(comm, from, data, count * SIZES[type], stream);
}

typedef struct { int kind; void *data; uint64_t count; int type; uint32_t peer; } Item;

/* Like the real library it refuses two tasks of one kind with the same rank. */
int HcclBatchSendRecv(Item *items, uint32_t count, void *comm, void *stream) {
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t j = 0; j < i; j++)
            if (items[i].kind == items[j].kind && items[i].peer == items[j].peer) return PARAMETER;
    for (int kind = 0; kind < 2; kind++)  /* sends, then receives */
        for (uint32_t i = 0; i < count; i++)
            if (items[i].kind == kind)
                TRY((kind ? HcclRecv : HcclSend)(items[i].data, items[i].count, items[i].type, items[i].peer, comm, stream));
    return OK;
}

/* Sends piece i to rank i and receives a piece from every rank; counts and offsets are in elements. */
static int exchange(Comm *c, const char *from, const uint64_t *counts, const uint64_t *offsets, size_t width,
                    char *into, const uint64_t *in_counts, const uint64_t *in_offsets, size_t in_width) {
    for (uint32_t i = 0; i < c->size; i++) TRY(send_to(c, i, from + offsets[i] * width, counts[i] * width));
    for (uint32_t i = 0; i < c->size; i++)
        TRY(receive_from(c, i, into + in_offsets[i] * in_width, in_counts[i] * in_width));
    return OK;
}

int HcclAlltoAllV(const void *from, const void *counts, const void *offsets, int type, void *into, const void *in_counts,
                  const void *in_offsets, int in_type, void *comm, void *stream) {
    return exchange(comm, from, counts, offsets, SIZES[type], into, in_counts, in_offsets, SIZES[in_type]);
}

int HcclAlltoAll(const void *from, uint64_t count, int type, void *into, uint64_t in_count, int in_type, void *comm,
                 void *stream) {
    uint64_t counts[MAX_RANKS], offsets[MAX_RANKS];
    for (uint32_t i = 0; i < MAX_RANKS; i++) counts[i] = count, offsets[i] = i * count;
    return exchange(comm, from, counts, offsets, SIZES[type], into, counts, offsets, SIZES[in_type]);
}

int HcclAllGatherV(const void *from, uint64_t count, void *into, const void *counts, const void *offsets, int type,
                   void *comm, void *stream) {
    uint64_t same[MAX_RANKS], zeros[MAX_RANKS] = {0};
    for (uint32_t i = 0; i < MAX_RANKS; i++) same[i] = count;
    return exchange(comm, from, same, zeros, SIZES[type], into, counts, offsets, SIZES[type]);
}

int HcclAllGather(const void *from, void *into, uint64_t count, int type, void *comm, void *stream) {
    uint64_t counts[MAX_RANKS], offsets[MAX_RANKS];
    for (uint32_t i = 0; i < MAX_RANKS; i++) counts[i] = count, offsets[i] = i * count;
    return HcclAllGatherV(from, count, into, counts, offsets, type, comm, stream);
}

int HcclReduceScatterV(const void *from, const void *counts, const void *offsets, void *into, uint64_t count, int type,
                       int op, void *comm, void *stream) {
    Comm *c = comm;
    uint64_t in_counts[MAX_RANKS], in_offsets[MAX_RANKS];
    for (uint32_t i = 0; i < MAX_RANKS; i++) in_counts[i] = count, in_offsets[i] = i * count;
    char *pieces = malloc(c->size * count * SIZES[type] + 1);
    if (!pieces) return MEMORY;
    TRY(exchange(c, from, counts, offsets, SIZES[type], pieces, in_counts, in_offsets, SIZES[type]));
    void *total = widened(pieces, count, type);
    for (uint32_t i = 1; i < c->size; i++) {
        void *piece = widened(pieces + i * count * SIZES[type], count, type);
        TRY(reduce(total, piece, count, type, op));
        free(piece);
    }
    narrowed(into, total, count, type);
    free(total);
    free(pieces);
    return OK;
}

int HcclReduceScatter(const void *from, void *into, uint64_t count, int type, int op, void *comm, void *stream) {
    uint64_t counts[MAX_RANKS], offsets[MAX_RANKS];
    for (uint32_t i = 0; i < MAX_RANKS; i++) counts[i] = count, offsets[i] = i * count;
    return HcclReduceScatterV(from, counts, offsets, into, count, type, op, comm, stream);
}

int HcclAllReduce(const void *from, void *into, uint64_t count, int type, int op, void *comm, void *stream) {
    uint64_t counts[MAX_RANKS], zeros[MAX_RANKS] = {0};
    for (uint32_t i = 0; i < MAX_RANKS; i++) counts[i] = count;
    return HcclReduceScatterV(from, counts, zeros, into, count, type, op, comm, stream);
}

int HcclReduce(const void *from, void *into, uint64_t count, int type, int op, uint32_t root, void *comm, void *stream) {
    void *unused = ((Comm *)comm)->rank == root ? NULL : malloc(count * SIZES[type] + 1);
    int error = HcclAllReduce(from, unused ? unused : into, count, type, op, comm, stream);
    free(unused);
    return error;
}

int HcclBroadcast(void *data, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
    Comm *c = comm;
    if (c->rank != root) return receive_from(c, root, data, count * SIZES[type]);
    for (uint32_t i = 0; i < c->size; i++)
        if (i != root) TRY(send_to(c, i, data, count * SIZES[type]));
    return OK;
}

int HcclScatter(const void *from, void *into, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
    Comm *c = comm;
    size_t size = count * SIZES[type];
    for (uint32_t i = 0; c->rank == root && i < c->size; i++) TRY(send_to(c, i, (const char *)from + i * size, size));
    return receive_from(c, root, into, size);
}
